"""What is measured: each operator and a whole decoder layer, at the shapes of known models, beside what others offer.

A case says what an ideal implementation has to read and write and to compute, counted from the shapes: forward and backward
each read their operands once and write their results once. Bytes are those of bfloat16 activations, of weights as they are
held, and of float32 factors. A multiplication and an addition count as two operations, an exponential as one.

    linear      2 M N K each for y and dx; 6 M r (N + K) for the adapter
    head        4 M V H, and the head read once, as a running softmax needs no second pass over it
    blocks      their linears, forward twice but for the last, as checkpointing demands; and attention
    others      a few operations a value: the bytes count

Rivals that are not installed are left out. Those that overwrite their arguments get fresh ones before each run.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from edge_kernels import quant
from edge_kernels.adamw8bit import AdamW8bit
from edge_kernels.adapter_linear import adapter_linear
from edge_kernels.apply import apply
from edge_kernels.attention import attention
from edge_kernels.checkpoint_block import checkpoint_block
from edge_kernels.gated_activation import gated_activation
from edge_kernels.layer_norm import layer_norm
from edge_kernels.linear_cross_entropy import linear_cross_entropy
from edge_kernels.packed_linear import packed_linear
from edge_kernels.quant import Packed
from edge_kernels.rms_norm import rms_norm
from edge_kernels.rotary import rotary
from torch import nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

DTYPE = torch.bfloat16
OURS = "ours"
RANK, SCALE = 16, 2.0
BLOCKS = 4  # blocks in a row of the checkpoint's case
SIZE = 2  # bytes of a bfloat16 value


class Shape(NamedTuple):
    """A model's sizes, as in its config; width is that of a head."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    layers: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of the seven linears of a layer."""
        queries, keys = self.heads * self.width, self.kv_heads * self.width
        attention = [(queries, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, queries)]
        return [*attention, *2 * [(self.intermediate, self.hidden)], (self.hidden, self.intermediate)]


SMALL = Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 30)
SHAPES = [
    Shape("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, 151936, 24),
    Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, 16),
    Shape("Llama-3.2-3B", 3072, 8192, 24, 8, 128, 128256, 28),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256, 32),
]


class Variant(NamedTuple):
    """One way to do a case. run: forward and backward, gives results and gradients. before: what is not timed."""

    run: Callable[[], list[torch.Tensor]]
    held_bytes: int = 0
    before: Callable[[], None] = lambda: None


Variants: TypeAlias = dict[str, Variant]


@dataclass(frozen=True)
class Case:
    """An operator at a shape: the bytes and FLOPs that it needs, and its variants, made on a device when it is measured.

    kind: of the weight or activation, or "". tokens: M, or 0 where the operator has none.
    """

    operator: str
    kind: str
    shape: Shape
    tokens: int
    bytes: int
    flops: int
    prepare: Callable[[torch.device], Variants]


def select(shapes: list[Shape], tokens: list[int], operators: Iterable[str] | None = None) -> Iterator[Case]:
    """All cases of some operators, of all if None; in this order: operator, kind, shape, tokens."""
    for operator in OPERATORS if operators is None else operators:
        kinds, make = OPERATORS[operator]
        for kind in kinds:
            for shape in shapes:
                for count in tokens if operator != "AdamW8bit" else [0]:
                    yield Case(operator, kind, shape, count, *make(shape, count, kind))


Made: TypeAlias = tuple[int, int, Callable[[torch.device], Variants]]  # bytes, FLOPs, prepare


# --- linears: the MLP's gate, the largest matrix with which a layer begins


def _adapter_linear(shape: Shape, tokens: int, kind: str) -> Made:
    out, into = shape.intermediate, shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy, weight = (
            _leaf(device, tokens, into),
            _draw(device, tokens, out),
            _weight(out, into, kind, device),
        )
        A, B = _factors(device, out, into)
        both = partial(_both_ways, leaves=[x, A, B], grads=[dy], held=[weight, A, B])

        def plain(product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda x, A, B: product(x) + SCALE * ((x @ A.to(DTYPE).T) @ B.to(DTYPE).T)

        found = {OURS: both(lambda x, A, B: adapter_linear(x, weight, A, None, B, SCALE))}
        found |= {name: both(plain(product)) for name, product in _products(weight).items()}
        if isinstance(weight, torch.Tensor):
            found |= _compiled(device, both, plain(lambda x: linear(x, weight)))
        for name, casts in {"PEFT": True, "PEFT, bf16 factors": False}.items():
            for base, frozen in _frozen(weight, device).items():
                layer = _peft(nn.Sequential(frozen), [(A, B)], casts)
                if layer is not None:
                    taught = [p for p in layer.parameters() if p.requires_grad]
                    held = [weight, *taught]
                    found[name + base] = _both_ways(lambda x, *_, it=layer: it(x), [x, *taught], [dy], held)
        return found

    return *_linear_cost(tokens, out, into, _weight_bytes(out, into, kind), RANK), prepare


def _packed_linear(shape: Shape, tokens: int, kind: str) -> Made:
    out, into = shape.intermediate, shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy, weight = (
            _leaf(device, tokens, into),
            _draw(device, tokens, out),
            _weight(out, into, kind, device),
        )
        assert isinstance(weight, Packed)
        both = partial(_both_ways, leaves=[x], grads=[dy], held=[weight])
        found = {OURS: both(lambda x: packed_linear(x, weight))}
        found |= {name: both(product) for name, product in _products(weight).items()}
        return found | {base.strip(", "): both(frozen) for base, frozen in _frozen(weight, device).items()}

    return *_linear_cost(tokens, out, into, _weight_bytes(out, into, kind), rank=0), prepare


def _linear_cost(
    tokens: int, out: int, into: int, weight_bytes: int, rank: int, forwards: int = 1
) -> tuple[int, int]:
    """Bytes and FLOPs of a linear: `forwards` times y, and a backward pass."""
    once = SIZE * tokens * (into + out) + weight_bytes + 4 * rank * (into + out)  # x, y, W, A and B
    back = SIZE * tokens * (into + out) + weight_bytes + 4 * rank * (into + out)  # dy, dx, W, A and B
    back += (SIZE * tokens * into + 4 * rank * (into + out)) if rank else 0  # x, dA and dB
    dense, low = 2 * tokens * out * into, 2 * tokens * rank * (into + out)
    return forwards * once + back, forwards * (dense + low) + dense + 2 * low


def _products(weight: torch.Tensor | Packed) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What torch offers for x Wᵀ: with a packed matrix, its expansion in each direction, or once and kept for backward."""
    if isinstance(weight, torch.Tensor):
        return {"torch": lambda x: linear(x, weight)}
    read = _expansion(weight)
    found = {"expand": lambda x: _Expanding.apply(x, read), "expand, kept": lambda x: linear(x, read())}
    if weight.quants.is_cuda:
        fused = torch.compile(read, dynamic=False)
        found["expand, compiled"] = lambda x: _Expanding.apply(x, fused)
    return found


class _Expanding(torch.autograd.Function):
    """What bitsandbytes does: the matrix is expanded anew for backward."""

    @staticmethod
    def forward(ctx, x, expand):  # type: ignore[no-untyped-def]
        ctx.expand = expand
        return x @ expand().T

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy @ ctx.expand(), None


def _expansion(packed: Packed) -> Callable[[], torch.Tensor]:
    """What makes the matrix dense in torch's operations, in the way that is fastest on its device.

    That is in pieces that fit a CPU's cache, as quant has it, and as a whole on a GPU, where a launch is what costs.
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
    """Modules that hold a frozen matrix, by what to call them: torch's, or bitsandbytes' of the nf4 kind."""
    if isinstance(weight, torch.Tensor):
        return {"": _linear_of(weight)}
    bitsandbytes = _module("bitsandbytes")
    if weight.format != "nf4" or bitsandbytes is None or device.type != "cuda":
        return {}
    out, into = weight.shape
    module = bitsandbytes.nn.Linear4bit(into, out, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    dense = _expansion(weight)().cpu()
    module.weight = bitsandbytes.nn.Params4bit(
        dense, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return {", bitsandbytes": module.to(device)}


def _linear_of(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _peft(
    module: nn.Module, factors: list[tuple[torch.Tensor, torch.Tensor]], casts: bool
) -> nn.Module | None:
    """The module with PEFT's LoRA on all its linears, with copies of these factors, which it holds in float32 if it casts."""
    peft = _module("peft")
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


# --- the loss


def _linear_cross_entropy(shape: Shape, tokens: int, kind: str) -> Made:
    vocabulary, width = shape.vocabulary, shape.hidden

    def prepare(device: torch.device) -> Variants:
        hidden, head = _leaf(device, tokens, width), _weight(vocabulary, width, kind, device)
        labels = torch.randint(0, vocabulary, (tokens,), device=device)
        both = partial(_both_ways, leaves=[hidden], grads=[None], held=[head])
        read = _expansion(head) if isinstance(head, Packed) else lambda: head

        def plain(hidden: torch.Tensor) -> torch.Tensor:
            return cross_entropy(linear(hidden, read()), labels)

        def upcast(hidden: torch.Tensor) -> torch.Tensor:
            return cross_entropy(linear(hidden, read()).float(), labels)

        base = "torch" if kind == "dense" else "expand, kept"
        found = {
            OURS: both(lambda hidden: linear_cross_entropy(hidden, head, labels)),
            base: both(plain),
            f"{base}, float32 logits": both(upcast),  # as transformers has it
        }
        found |= _compiled(device, both, upcast, base)
        if (liger := _liger(device)) is not None:
            found["Liger"] = both(
                lambda hidden: liger.liger_fused_linear_cross_entropy(hidden, read(), labels)
            )
        return found

    moved = _weight_bytes(vocabulary, width, kind) + 2 * SIZE * tokens * width + 8 * tokens  # h, dh, labels
    return moved, 4 * tokens * vocabulary * width, prepare


# --- between the products


def _rms_norm(shape: Shape, tokens: int, kind: str) -> Made:
    values = tokens * shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy = _leaf(device, tokens, shape.hidden), _draw(device, tokens, shape.hidden)
        weight = 1 + 0.1 * _draw(device, shape.hidden)
        both = partial(_both_ways, leaves=[x], grads=[dy], held=[weight])

        def written_out(x: torch.Tensor) -> torch.Tensor:  # as transformers has it
            x32 = x.float()
            return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        found = {
            OURS: both(lambda x: rms_norm(x, weight, 1e-6)),
            "torch": both(lambda x: nn.functional.rms_norm(x, (shape.hidden,), weight, 1e-6)),
            "transformers": both(written_out),
        }
        found |= _compiled(device, both, written_out)
        if (liger := _liger(device)) is not None:
            found["Liger"] = _overwriting(
                lambda x: liger.liger_rms_norm(x, weight, 1e-6), [x], [dy], [weight]
            )
        return found

    moved = (
        5 * SIZE * values + 2 * 4 * tokens + 2 * SIZE * shape.hidden
    )  # x, y; dy, x, dx; a number a row; the weight
    return moved, 11 * values, prepare


def _layer_norm(shape: Shape, tokens: int, kind: str) -> Made:
    values = tokens * shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy = _leaf(device, tokens, shape.hidden), _draw(device, tokens, shape.hidden)
        weight, bias = 1 + 0.1 * _draw(device, shape.hidden), _draw(device, shape.hidden)
        both = partial(_both_ways, leaves=[x], grads=[dy], held=[weight, bias])

        def plain(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (shape.hidden,), weight, bias, 1e-5)

        found = {OURS: both(lambda x: layer_norm(x, weight, bias, 1e-5)), "torch": both(plain)}
        found |= _compiled(device, both, plain)
        if (liger := _liger(device)) is not None:
            found["Liger"] = both(lambda x: liger.liger_layer_norm(x, weight, bias, 1e-5))
        return found

    moved = (
        5 * SIZE * values + 2 * 2 * 4 * tokens + 3 * SIZE * shape.hidden
    )  # as above; two numbers a row; weight, bias
    return moved, 17 * values, prepare


def _gated_activation(shape: Shape, tokens: int, kind: str) -> Made:
    values = tokens * shape.intermediate

    def prepare(device: torch.device) -> Variants:
        gate, up = (_leaf(device, tokens, shape.intermediate) for _ in range(2))
        dy = _draw(device, tokens, shape.intermediate)
        both = partial(_both_ways, leaves=[gate, up], grads=[dy])

        def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return silu(gate) * up

        found = {OURS: both(lambda gate, up: gated_activation(gate, up, "silu")), "torch": both(plain)}
        found |= _compiled(device, both, plain)
        if (liger := _liger(device)) is not None:
            found["Liger"] = _overwriting(liger.liger_swiglu, [gate, up], [dy])
        return found

    return 8 * SIZE * values, 15 * values, prepare  # gate, up, y; dy, gate, up, and two gradients


def _rotary(shape: Shape, tokens: int, kind: str) -> Made:
    values = tokens * (shape.heads + shape.kv_heads) * shape.width

    def prepare(device: torch.device) -> Variants:
        q, k = (  # as a projection leaves them
            _draw(device, 1, tokens, heads, shape.width).transpose(1, 2).requires_grad_()
            for heads in (shape.heads, shape.kv_heads)
        )
        grads = [torch.randn_like(q), torch.randn_like(k)]
        cos, sin = _positions(device, tokens, shape.width)
        both = partial(_both_ways, leaves=[q, k], grads=grads)

        def plain(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:  # as transformers has it
            return tuple(x * cos[:, None] + _half_turned(x) * sin[:, None] for x in (q, k))

        found = {OURS: both(lambda q, k: rotary(q, k, cos, sin)), "torch": both(plain)}
        found |= _compiled(device, both, plain)
        if (liger := _liger(device)) is not None:
            found["Liger"] = _overwriting(lambda q, k: liger.liger_rope(q, k, cos, sin), [q, k], grads)
        return found

    return (
        2 * SIZE * (2 * values + 2 * tokens * shape.width),
        6 * values,
        prepare,
    )  # in, out, cos, sin; both ways


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _attention(shape: Shape, tokens: int, kind: str) -> Made:
    values, scale = tokens * shape.width * (2 * shape.heads + 2 * shape.kv_heads), shape.width**-0.5

    def prepare(device: torch.device) -> Variants:
        q, k, v = (  # as a projection leaves them
            _draw(device, 1, tokens, heads, shape.width).transpose(1, 2).requires_grad_()
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        both = partial(_both_ways, leaves=[q, k, v], grads=[torch.randn_like(q)])

        def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        return {OURS: both(lambda q, k, v: attention(q, k, v, scale)), "torch": both(plain)}

    pairs = tokens * tokens // 2  # of a query and a key that it sees
    products = 2 + 5  # forward and backward; q, k, v and o move both ways
    return 2 * SIZE * values, products * 2 * pairs * shape.heads * shape.width, prepare


# --- the optimiser: all factors of a model


def _adamw8bit(shape: Shape, tokens: int, kind: str) -> Made:
    sizes = shape.layers * [size for out, into in shape.linears for size in ((RANK, into), (out, RANK))]
    values = sum(rows * columns for rows, columns in sizes)

    def prepare(device: torch.device) -> Variants:
        grads = [torch.randn(size, device=device) for size in sizes]

        def stepping(
            make: Callable[[list[torch.Tensor]], Any], state_bytes: int, hooked: bool = False
        ) -> Variant:
            parameters = [torch.zeros(size, device=device, requires_grad=True) for size in sizes]
            optimiser = make(parameters)

            def run() -> list[torch.Tensor]:
                torch.autograd.backward(parameters, grads)
                if not hooked:
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                return [parameter.detach() for parameter in parameters]

            return Variant(run, state_bytes + 4 * values)

        def ours(parameters: list[torch.Tensor]) -> AdamW8bit:
            return AdamW8bit(parameters, lr=1e-3)

        small = sum(
            8 * rows * columns for rows, columns in sizes if rows * columns < 4096
        )  # float32 in bitsandbytes
        AdamW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
        found = {
            OURS: stepping(ours, 2 * values + values // 32, hooked=True),
            "torch, fused": stepping(partial(AdamW, fused=True), 8 * values),
            "torch, foreach": stepping(partial(AdamW, foreach=True), 8 * values),
        }
        bitsandbytes = _module("bitsandbytes")
        if bitsandbytes is not None and device.type == "cuda":
            make = partial(bitsandbytes.optim.AdamW8bit, lr=1e-3, weight_decay=0.0)
            found["bitsandbytes"] = stepping(make, 2 * values + values // 32 + small)
        return found

    # a factor and its moments with their scales (one of 256 values) read and written, its gradient read
    return 16 * values + 16 * values // 256, 15 * values, prepare


# --- whole blocks


def _checkpoint_block(shape: Shape, tokens: int, kind: str) -> Made:
    def prepare(device: torch.device) -> Variants:
        x, dy = _leaf(device, tokens, shape.hidden), _draw(device, tokens, shape.hidden)
        gate, up, down = (_draw(device, *size) / size[1] ** 0.5 for size in shape.linears[-3:])

        def block(x: torch.Tensor) -> torch.Tensor:
            return x + linear(silu(linear(x, gate)) * linear(x, up), down)

        def chain(checkpoint: Callable[..., Any]) -> Variant:
            def run(x: torch.Tensor) -> torch.Tensor:
                for _ in range(BLOCKS):
                    x = checkpoint(block, x)
                return x

            return _both_ways(run, [x], [dy], [gate, up, down])

        torchs = import_module("torch.utils.checkpoint").checkpoint
        return {
            OURS: chain(checkpoint_block),
            "ours, int8": chain(partial(checkpoint_block, keep="int8")),
            "torch": chain(partial(torchs, use_reentrant=False)),
            "torch, reentrant": chain(partial(torchs, use_reentrant=True)),
        }

    moved, flops = _block_cost(tokens, shape.linears[-3:], rank=0)
    return BLOCKS * moved, BLOCKS * flops, prepare


def _block_cost(tokens: int, linears: list[tuple[int, int]], rank: int) -> tuple[int, int]:
    """Bytes and FLOPs of linears that run forward, forward again and backward; the last one's result is not needed again."""
    forwards = [2] * (len(linears) - 1) + [1]
    costs = [
        _linear_cost(tokens, *size, SIZE * math.prod(size), rank, n)
        for size, n in zip(linears, forwards, strict=True)
    ]
    moved, flops = (sum(part) for part in zip(*costs, strict=True))
    return moved, flops


def _decoder_layer(shape: Shape, tokens: int, kind: str) -> Made:
    def prepare(device: torch.device) -> Variants:
        llama = import_module("transformers.models.llama.modeling_llama")
        checkpoint = import_module("torch.utils.checkpoint").checkpoint
        config = llama.LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.width,
            attn_implementation="sdpa",
        )
        with device:
            layer = llama.LlamaDecoderLayer(config, 0).to(DTYPE).requires_grad_(False)
        x, dy = _leaf(device, 1, tokens, shape.hidden), _draw(device, 1, tokens, shape.hidden)
        positions = _positions(device, tokens, shape.width)
        factors = [_factors(device, part.out_features, part.in_features) for part in _linears(layer)]
        weights = list(layer.parameters())

        def variant(module: nn.Module, checkpoint: Callable[..., Any], taught: list[torch.Tensor]) -> Variant:
            forward = lambda x, *_: checkpoint(module, x, position_embeddings=positions)  # noqa: E731
            return _both_ways(forward, [x, *taught], [dy], [*weights, *taught])

        ours = _twin(layer)
        for part, (A, B) in zip(_linears(ours), factors, strict=True):
            part.forward = partial(_adapted, part.weight, A, B)
        apply(ours)
        found = {OURS: variant(ours, checkpoint_block, [factor for pair in factors for factor in pair])}
        for name, casts in {"PEFT": True, "PEFT, bf16 factors": False}.items():
            theirs = _peft(_twin(layer), factors, casts)
            if theirs is not None:
                taught = [p for p in theirs.parameters() if p.requires_grad]
                both = partial(variant, checkpoint=partial(checkpoint, use_reentrant=False), taught=taught)
                found[name] = both(theirs)
                found |= _compiled(device, both, theirs, name)
        return found

    moved, flops = _block_cost(tokens, shape.linears, RANK)
    # causal attention: two products of M² width / 2 a head forward, twice, and five backward; the rest rides on the products
    return moved, flops + 9 * tokens**2 * shape.heads * shape.width, prepare


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [part for part in layer.modules() if isinstance(part, nn.Linear)]


def _twin(layer: nn.Module) -> nn.Module:
    """A copy with modules of its own on the same weights."""
    return copy.deepcopy(layer, {id(weight): weight for weight in layer.parameters()})


def _adapted(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return adapter_linear(x, weight, A, None, B, SCALE)


OPERATORS: dict[str, tuple[tuple[str, ...], Callable[[Shape, int, str], Made]]] = {
    "adapter_linear": (("dense", *quant.BLOCK), _adapter_linear),
    "packed_linear": (tuple(quant.BLOCK), _packed_linear),
    "linear_cross_entropy": (("dense", "q8_0", "q4_0"), _linear_cross_entropy),
    "rms_norm": (("",), _rms_norm),
    "layer_norm": (("",), _layer_norm),
    "gated_activation": (("silu",), _gated_activation),
    "rotary": (("",), _rotary),
    "attention": (("",), _attention),
    "AdamW8bit": (("",), _adamw8bit),
    "checkpoint_block": (("",), _checkpoint_block),
    "decoder_layer": (("",), _decoder_layer),
}


# --- what the cases share


def _both_ways(
    forward: Callable[..., Any],
    leaves: list[torch.Tensor],
    grads: list[Any],
    held: Iterable[torch.Tensor | Packed] = (),
) -> Variant:
    """forward(*leaves) and its backward pass from these gradients; gives the results and the leaves' gradients."""

    def run() -> list[torch.Tensor]:
        try:
            y = forward(*leaves)
            results = (y,) if isinstance(y, torch.Tensor) else y
            torch.autograd.backward(results, grads)
            return [
                *(result.detach() for result in results),
                *(leaf.grad for leaf in leaves if leaf.grad is not None),
            ]
        finally:
            for leaf in leaves:
                leaf.grad = None

    return Variant(run, sum(part.nbytes for part in held))


def _overwriting(
    forward: Callable[..., Any],
    leaves: list[torch.Tensor],
    grads: list[torch.Tensor],
    held: Iterable[torch.Tensor | Packed] = (),
) -> Variant:
    """As _both_ways, for one that writes to what it is given: it gets its own, made anew before each run."""
    pairs = [(part, part.detach().clone().requires_grad_(part.requires_grad)) for part in (*leaves, *grads)]

    @torch.no_grad()
    def renew() -> None:
        for original, own in pairs:
            own.copy_(original)

    own = [own for _, own in pairs]
    return _both_ways(forward, own[: len(leaves)], own[len(leaves) :], held)._replace(before=renew)


def _compiled(
    device: torch.device, both: Callable[[Any], Variant], form: Any, name: str = "torch"
) -> Variants:
    """The compiled form, where there is a GPU: on a CPU the compiler's memory would be most of what is measured."""
    return {f"{name}, compiled": both(torch.compile(form, dynamic=False))} if device.type == "cuda" else {}


def _draw(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def _leaf(device: torch.device, *shape: int) -> torch.Tensor:
    return _draw(device, *shape).requires_grad_()


def _factors(device: torch.device, out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in float32, whose product matters beside the frozen one, but does not drown it."""
    A, B = (torch.randn(RANK, into, device=device) / into**0.5, torch.randn(out, RANK, device=device) / 8)
    return A.requires_grad_(), B.requires_grad_()


def _positions(device: torch.device, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, tokens, width)."""
    slower = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = (torch.arange(tokens, device=device)[:, None] * slower).repeat(1, 2)[None]
    return angles.cos().to(DTYPE), angles.sin().to(DTYPE)


@lru_cache(maxsize=1)  # packing takes longer than a case, and cases of one matrix follow each other
def _weight(out: int, into: int, kind: str, device: torch.device) -> torch.Tensor | Packed:
    weight = _draw(device, out, into) / into**0.5
    return quant.pack(weight, kind) if kind in quant.BLOCK else weight  # type: ignore[arg-type]


def _weight_bytes(out: int, into: int, kind: str) -> int:
    if kind == "dense":
        return SIZE * out * into
    size = quant.BLOCK[kind]
    blocks = out * -(-into // size)
    scales = {
        "q8_0": 2 * blocks,
        "q4_0": 2 * blocks,
        "q4_1": 4 * blocks,
        "nf4": blocks + 4 * -(-blocks // 256) + 4,
    }
    return blocks * size // (1 if kind == "q8_0" else 2) + scales[kind]


@cache
def _module(name: str) -> Any:
    """A rival's module, or None where it cannot be imported."""
    try:
        return import_module(name)
    except ImportError:
        return None


def _liger(device: torch.device) -> Any:
    """Liger's functions, which are Triton's."""
    return _module("liger_kernel.transformers.functional") if device.type == "cuda" else None
