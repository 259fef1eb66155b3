"""All factors of a model in the optimiser, and whole blocks of layers."""

import copy
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from edge_kernels.adamw8bit import AdamW8bit
from edge_kernels.adapter_linear import adapter_linear
from edge_kernels.apply import Modules, apply
from edge_kernels.checkpoint_block import checkpoint_block
from torch import nn
from torch.nn.functional import linear, silu

from benchmarks.kernels.cases.case import DTYPE, OURS, RANK, SCALE, SIZE, Counted, Shape, Variant, Variants
from benchmarks.kernels.cases.linear import linear_cost, with_peft
from benchmarks.kernels.cases.variants import (
    compiled,
    draw,
    draw_factors,
    draw_leaf,
    forward_backward,
    installed,
    positions,
)

BLOCKS = 4  # blocks in a row of the checkpoint's case


def adamw8bit_case(shape: Shape, tokens: int, kind: str) -> Counted:
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
        variants = {
            OURS: stepping(ours, 2 * values + values // 32, hooked=True),
            "torch, fused": stepping(partial(AdamW, fused=True), 8 * values),
            "torch, foreach": stepping(partial(AdamW, foreach=True), 8 * values),
        }
        bitsandbytes = installed("bitsandbytes")
        if bitsandbytes is not None and device.type == "cuda":
            make = partial(bitsandbytes.optim.AdamW8bit, lr=1e-3, weight_decay=0.0)
            variants["bitsandbytes"] = stepping(make, 2 * values + values // 32 + small)
        return variants

    # factor, moments and scales (one for 256 values) are read and written, the gradient is read
    return 16 * values + 16 * values // 256, 15 * values, prepare


# --- whole blocks


def checkpoint_block_case(shape: Shape, tokens: int, kind: str) -> Counted:
    def prepare(device: torch.device) -> Variants:
        x, dy = draw_leaf(device, tokens, shape.hidden), draw(device, tokens, shape.hidden)
        gate, up, down = (draw(device, *size) / size[1] ** 0.5 for size in shape.linears[-3:])

        def block(x: torch.Tensor) -> torch.Tensor:
            return x + linear(silu(linear(x, gate)) * linear(x, up), down)

        def chain(checkpoint: Callable[..., Any]) -> Variant:
            def run(x: torch.Tensor) -> torch.Tensor:
                for _ in range(BLOCKS):
                    x = checkpoint(block, x)
                return x

            return forward_backward(run, [x], [dy], [gate, up, down])

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
    """Bytes and FLOPs of linears that run forward twice, but for the last one, and backward."""
    forwards = [2] * (len(linears) - 1) + [1]
    costs = [
        linear_cost(tokens, *size, SIZE * math.prod(size), rank, n)
        for size, n in zip(linears, forwards, strict=True)
    ]
    moved, flops = (sum(part) for part in zip(*costs, strict=True))
    return moved, flops


def decoder_layer_case(shape: Shape, tokens: int, kind: str) -> Counted:
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
        x, dy = draw_leaf(device, 1, tokens, shape.hidden), draw(device, 1, tokens, shape.hidden)
        embeddings = positions(device, tokens, shape.width)
        factors = [draw_factors(device, part.out_features, part.in_features) for part in _linears(layer)]
        weights = list(layer.parameters())

        def variant(module: nn.Module, checkpoint: Callable[..., Any], taught: list[torch.Tensor]) -> Variant:
            forward = lambda x, *_: checkpoint(module, x, position_embeddings=embeddings)  # noqa: E731
            return forward_backward(forward, [x, *taught], [dy], [*weights, *taught])

        ours = _twin(layer)
        for part, (A, B) in zip(_linears(ours), factors, strict=True):
            part.forward = partial(_adapted, part.weight, A, B)
        apply(ours, Modules("LlamaRMSNorm", 0.0, "LlamaMLP", "gated"))
        variants = {OURS: variant(ours, checkpoint_block, [factor for pair in factors for factor in pair])}
        for name, casts in {"PEFT": True, "PEFT, bf16 factors": False}.items():
            theirs = with_peft(_twin(layer), factors, casts)
            if theirs is not None:
                taught = [p for p in theirs.parameters() if p.requires_grad]
                variant = partial(variant, checkpoint=partial(checkpoint, use_reentrant=False), taught=taught)
                variants[name] = variant(theirs)
                variants |= compiled(device, variant, theirs, name)
        return variants

    moved, flops = _block_cost(tokens, shape.linears, RANK)
    # causal attention: two products of M² width / 2 a head forward, twice, and five backward
    return moved, flops + 9 * tokens**2 * shape.heads * shape.width, prepare


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [part for part in layer.modules() if isinstance(part, nn.Linear)]


def _twin(layer: nn.Module) -> nn.Module:
    """A copy with modules of its own on the same weights."""
    return copy.deepcopy(layer, {id(weight): weight for weight in layer.parameters()})


def _adapted(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return adapter_linear(x, weight, A, None, B, SCALE)
