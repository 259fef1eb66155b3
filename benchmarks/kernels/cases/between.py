"""The operators between the products: norms, gated activation, rotary positions, attention."""

from functools import partial

import torch
from edge_kernels.attention import attention
from edge_kernels.gated_activation import gated_activation
from edge_kernels.norms import layer_norm, rms_norm
from edge_kernels.rotary import rotary
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from benchmarks.kernels.cases.case import OURS, SIZE, Counted, Shape, Variants
from benchmarks.kernels.cases.variants import (
    compiled,
    draw,
    draw_leaf,
    forward_backward,
    liger_functions,
    overwriting,
    positions,
)


def rms_norm_case(shape: Shape, tokens: int, kind: str) -> Counted:
    values = tokens * shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy = draw_leaf(device, tokens, shape.hidden), draw(device, tokens, shape.hidden)
        weight = 1 + 0.1 * draw(device, shape.hidden)
        variant = partial(forward_backward, leaves=[x], grads=[dy], held=[weight])

        def written_out(x: torch.Tensor) -> torch.Tensor:  # as transformers has it
            x32 = x.float()
            return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        variants = {
            OURS: variant(lambda x: rms_norm(x, weight, 1e-6)),
            "torch": variant(lambda x: nn.functional.rms_norm(x, (shape.hidden,), weight, 1e-6)),
            "transformers": variant(written_out),
        }
        variants |= compiled(device, variant, written_out)
        if (liger := liger_functions(device)) is not None:
            variants["Liger"] = overwriting(
                lambda x: liger.liger_rms_norm(x, weight, 1e-6), [x], [dy], [weight]
            )
        return variants

    moved = (
        5 * SIZE * values + 2 * 4 * tokens + 2 * SIZE * shape.hidden
    )  # x, y; dy, x, dx; a number a row; the weight
    return moved, 11 * values, prepare


def layer_norm_case(shape: Shape, tokens: int, kind: str) -> Counted:
    values = tokens * shape.hidden

    def prepare(device: torch.device) -> Variants:
        x, dy = draw_leaf(device, tokens, shape.hidden), draw(device, tokens, shape.hidden)
        weight, bias = 1 + 0.1 * draw(device, shape.hidden), draw(device, shape.hidden)
        variant = partial(forward_backward, leaves=[x], grads=[dy], held=[weight, bias])

        def plain(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (shape.hidden,), weight, bias, 1e-5)

        variants = {OURS: variant(lambda x: layer_norm(x, weight, bias, 1e-5)), "torch": variant(plain)}
        variants |= compiled(device, variant, plain)
        if (liger := liger_functions(device)) is not None:
            variants["Liger"] = variant(lambda x: liger.liger_layer_norm(x, weight, bias, 1e-5))
        return variants

    moved = (
        5 * SIZE * values + 2 * 2 * 4 * tokens + 3 * SIZE * shape.hidden
    )  # as above; two numbers a row; weight, bias
    return moved, 17 * values, prepare


def gated_activation_case(shape: Shape, tokens: int, kind: str) -> Counted:
    values = tokens * shape.intermediate

    def prepare(device: torch.device) -> Variants:
        gate, up = (draw_leaf(device, tokens, shape.intermediate) for _ in range(2))
        dy = draw(device, tokens, shape.intermediate)
        variant = partial(forward_backward, leaves=[gate, up], grads=[dy])

        def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return silu(gate) * up

        variants = {
            OURS: variant(lambda gate, up: gated_activation(gate, up, "silu")),
            "torch": variant(plain),
        }
        variants |= compiled(device, variant, plain)
        if (liger := liger_functions(device)) is not None:
            variants["Liger"] = overwriting(liger.liger_swiglu, [gate, up], [dy])
        return variants

    return 8 * SIZE * values, 15 * values, prepare  # gate, up, y; dy, gate, up, and two gradients


def rotary_case(shape: Shape, tokens: int, kind: str) -> Counted:
    values = tokens * (shape.heads + shape.kv_heads) * shape.width

    def prepare(device: torch.device) -> Variants:
        q, k = (  # as a projection leaves them
            draw(device, 1, tokens, heads, shape.width).transpose(1, 2).requires_grad_()
            for heads in (shape.heads, shape.kv_heads)
        )
        grads = [torch.randn_like(q), torch.randn_like(k)]
        cos, sin = positions(device, tokens, shape.width)
        variant = partial(forward_backward, leaves=[q, k], grads=grads)

        def plain(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:  # as transformers has it
            return tuple(x * cos[:, None] + _half_turned(x) * sin[:, None] for x in (q, k))

        variants = {OURS: variant(lambda q, k: rotary(q, k, cos, sin)), "torch": variant(plain)}
        variants |= compiled(device, variant, plain)
        if (liger := liger_functions(device)) is not None:
            variants["Liger"] = overwriting(lambda q, k: liger.liger_rope(q, k, cos, sin), [q, k], grads)
        return variants

    return (
        2 * SIZE * (2 * values + 2 * tokens * shape.width),
        6 * values,
        prepare,
    )  # in, out, cos, sin; both ways


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def attention_case(shape: Shape, tokens: int, kind: str) -> Counted:
    values, scale = tokens * shape.width * (2 * shape.heads + 2 * shape.kv_heads), shape.width**-0.5

    def prepare(device: torch.device) -> Variants:
        q, k, v = (  # as a projection leaves them
            draw(device, 1, tokens, heads, shape.width).transpose(1, 2).requires_grad_()
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        variant = partial(forward_backward, leaves=[q, k, v], grads=[torch.randn_like(q)])

        def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        return {OURS: variant(lambda q, k, v: attention(q, k, v, scale)), "torch": variant(plain)}

    pairs = tokens * tokens // 2  # of a query and a key that it sees
    products = 2 + 5  # forward and backward; q, k, v and o move both ways
    return 2 * SIZE * values, products * 2 * pairs * shape.heads * shape.width, prepare
