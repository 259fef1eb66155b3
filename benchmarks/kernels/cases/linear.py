"""Linear layers: the MLP's gate, which is among a layer's largest matrices."""

from collections.abc import Callable
from functools import partial

import torch
from edge_kernels import quant
from edge_kernels.adapter_linear import adapter_linear
from edge_kernels.packed_linear import packed_linear
from edge_kernels.quant import Packed
from torch import nn
from torch.nn.functional import linear

from benchmarks.kernels.cases.case import DTYPE, OURS, RANK, SCALE, SIZE, Counted, Shape, Variants
from benchmarks.kernels.cases.variants import (
    compiled,
    draw,
    draw_factors,
    draw_leaf,
    draw_weight,
    forward_backward,
    installed,
    weight_bytes,
)


def adapter_linear_case(shape: Shape, tokens: int, kind: str) -> Counted:
    out, into = shape.intermediate, shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy, weight = (
            draw_leaf(device, tokens, into),
            draw(device, tokens, out),
            draw_weight(out, into, kind, device),
        )
        A, B = draw_factors(device, out, into)
        variant = partial(forward_backward, leaves=[x, A, B], grads=[dy], held=[weight, A, B])

        def plain(product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda x, A, B: product(x) + SCALE * ((x @ A.to(DTYPE).T) @ B.to(DTYPE).T)

        variants = {OURS: variant(lambda x, A, B: adapter_linear(x, weight, A, None, B, SCALE))}
        variants |= {name: variant(plain(product)) for name, product in _products(weight).items()}
        if isinstance(weight, torch.Tensor):
            variants |= compiled(device, variant, plain(lambda x: linear(x, weight)))
        for name, casts in {"PEFT": True, "PEFT, bf16 factors": False}.items():
            for base, frozen in _frozen(weight, device).items():
                layer = with_peft(nn.Sequential(frozen), [(A, B)], casts)
                if layer is not None:
                    taught = [p for p in layer.parameters() if p.requires_grad]
                    held = [weight, *taught]
                    variants[name + base] = forward_backward(
                        lambda x, *_, it=layer: it(x), [x, *taught], [dy], held
                    )
        return variants

    return *linear_cost(tokens, out, into, weight_bytes(out, into, kind), RANK), prepare


def packed_linear_case(shape: Shape, tokens: int, kind: str) -> Counted:
    out, into = shape.intermediate, shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy, weight = (
            draw_leaf(device, tokens, into),
            draw(device, tokens, out),
            draw_weight(out, into, kind, device),
        )
        assert isinstance(weight, Packed)
        variant = partial(forward_backward, leaves=[x], grads=[dy], held=[weight])
        variants = {OURS: variant(lambda x: packed_linear(x, weight))}
        variants |= {name: variant(product) for name, product in _products(weight).items()}
        return variants | {
            base.strip(", "): variant(frozen) for base, frozen in _frozen(weight, device).items()
        }

    return *linear_cost(tokens, out, into, weight_bytes(out, into, kind), rank=0), prepare


def linear_cost(
    tokens: int, out: int, into: int, weight_bytes: int, rank: int, forwards: int = 1
) -> tuple[int, int]:
    """Bytes and FLOPs of a linear: `forwards` times y, and a backward pass."""
    once = SIZE * tokens * (into + out) + weight_bytes + 4 * rank * (into + out)  # x, y, W, A and B
    back = SIZE * tokens * (into + out) + weight_bytes + 4 * rank * (into + out)  # dy, dx, W, A and B
    back += (SIZE * tokens * into + 4 * rank * (into + out)) if rank else 0  # x, dA and dB
    dense, low = 2 * tokens * out * into, 2 * tokens * rank * (into + out)
    return forwards * once + back, forwards * (dense + low) + dense + 2 * low


def _products(weight: torch.Tensor | Packed) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """torch's ways to x Wᵀ; a packed matrix is expanded in each direction, or once and kept."""
    if isinstance(weight, torch.Tensor):
        return {"torch": lambda x: linear(x, weight)}
    read = expansion(weight)
    variants = {"expand": lambda x: _Expanding.apply(x, read), "expand, kept": lambda x: linear(x, read())}
    if weight.quants.is_cuda:
        fused = torch.compile(read, dynamic=False)
        variants["expand, compiled"] = lambda x: _Expanding.apply(x, fused)
    return variants


class _Expanding(torch.autograd.Function):
    """What bitsandbytes does: the matrix is expanded anew for backward."""

    @staticmethod
    def forward(ctx, x, expand):  # type: ignore[no-untyped-def]
        ctx.expand = expand
        return x @ expand().T

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy @ ctx.expand(), None


def expansion(packed: Packed) -> Callable[[], torch.Tensor]:
    """What makes the matrix dense in torch's operations, in the way that is fastest on its device.

    That is in pieces that fit a CPU's cache, as quant has it, and as a whole on a GPU, where a
    launch is what costs.
    """
    return _whole(packed) if packed.quants.is_cuda else partial(quant.expand, packed, DTYPE)


def _whole(packed: Packed) -> Callable[[], torch.Tensor]:
    device, blocks = packed.quants.device, packed.scales.shape[1]
    values, levels = torch.tensor(quant.NF4, device=device), quant.dynamic_map(device)

    def expand() -> torch.Tensor:
        quants = packed.quants.view(packed.shape[0], blocks, -1)
        if packed.format != "q8_0":
            quants = torch.cat((quants & 15, quants >> 4), -1)
        if packed.format == "nf4":
            assert packed.groups is not None and packed.offset is not None
            scales = levels[packed.scales.flatten().int()]
            scales = scales * packed.groups.repeat_interleave(quant.GROUP)[: len(scales)] + packed.offset
            matrix = values[quants.int()] * scales.view(-1, blocks, 1)
        else:
            matrix = (quants.float() - (8 if packed.format == "q4_0" else 0)) * packed.scales[..., None]
            matrix = matrix if packed.mins is None else matrix + packed.mins[..., None]
        return matrix.flatten(1)[:, : packed.shape[1]].to(DTYPE)

    return expand


def _frozen(weight: torch.Tensor | Packed, device: torch.device) -> dict[str, nn.Module]:
    """Modules that hold a frozen matrix, by name: torch's, or bitsandbytes' for nf4."""
    if isinstance(weight, torch.Tensor):
        return {"": _linear_of(weight)}
    bitsandbytes = installed("bitsandbytes")
    if weight.format != "nf4" or bitsandbytes is None or device.type != "cuda":
        return {}
    out, into = weight.shape
    module = bitsandbytes.nn.Linear4bit(into, out, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    dense = expansion(weight)().cpu()
    module.weight = bitsandbytes.nn.Params4bit(
        dense, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return {", bitsandbytes": module.to(device)}


def _linear_of(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def with_peft(
    module: nn.Module, factors: list[tuple[torch.Tensor, torch.Tensor]], casts: bool
) -> nn.Module | None:
    """The module with PEFT's LoRA on all linears, with copies of the factors; float32 if it casts."""
    peft = installed("peft")
    if peft is None:
        return None
    module.is_loaded_in_4bit = any(type(part).__name__ == "Linear4bit" for part in module.modules())
    targets = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    config = peft.LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=targets)
    adapted = peft.get_peft_model(module, config, autocast_adapter_dtype=casts).base_model.model
    layers = [part for part in adapted.modules() if hasattr(part, "lora_A")]
    with torch.no_grad():
        for layer, (A, B) in zip(layers, factors, strict=True):
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
    return adapted
