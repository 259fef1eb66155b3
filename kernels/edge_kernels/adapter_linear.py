"""A frozen linear layer with a low-rank adapter.

    y = x Wᵀ + scale · ((x Aᵀ) Cᵀ) Bᵀ (+ bias)

    dx = dy W + scale · ((dy B) C) A        dA = scale · ((dy B) C)ᵀ x
    dC = scale · (dy B)ᵀ (x Aᵀ)             dB = scale · dyᵀ ((x Aᵀ) Cᵀ)

Kept for backward: W as it is, dense or packed; and x, from which x Aᵀ is computed again. Where A is
frozen: x Aᵀ instead of x, or neither where B and C are frozen, too.
Every product but the frozen one has rank r. The two products that have the frozen one's shape are
added in its accumulator (see packed_linear).
Source: Hu et al. 2021, arXiv 2106.09685, with a square core C between the factors.
"""

import math

import torch

from edge_kernels.checkpoint_block import nothing_reads
from edge_kernels.packed_linear import check_frozen, product
from edge_kernels.quant import Packed


def adapter_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    A: torch.Tensor,
    C: torch.Tensor | None,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the layer; the result is (..., out) of x's dtype.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        weight: (out, in) frozen, of x's dtype, or packed.
        A: (r, in) of any float dtype, which its gradient has, too; r is 1 to 256.
        C: (r, r) of any float dtype, or None for the identity.
        B: (out, r) of any float dtype.
        scale: alpha / r.
        bias: (out,) frozen, or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, a part of a packed weight does
            not fit its shape, r is out of range, or scale is not finite. The message names the
            argument.
    """
    check_frozen(x, weight, bias, "weight")
    out, into = weight.shape
    rank = A.shape[0]
    for name, factor, needed in (("A", A, (rank, into)), ("C", C, (rank, rank)), ("B", B, (out, rank))):
        if factor is None:
            continue
        if tuple(factor.shape) != needed:
            raise ValueError(f"{name} is {tuple(factor.shape)} but has to be {needed}")
        if not factor.is_floating_point() or factor.device != x.device:
            raise ValueError(
                f"{name} is {factor.dtype} on {factor.device}, but has to be floats on {x.device}"
            )
    if not 1 <= rank <= 256:
        raise ValueError(f"A has rank {rank}, but it has to be 1 to 256")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, but has to be finite")
    y: torch.Tensor = _AdapterLinear.apply(x, weight, A, C, B, scale, bias)
    return y


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, C, B, scale, bias):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        _, _, trains_a, trains_c, trains_b, *_ = ctx.needs_input_grad
        z = rows @ A.to(x.dtype).T
        source = rows if trains_a else z if trains_c or trains_b else None  # gives z in backward
        saved = (source, A, C, B, *(weight.parts if isinstance(weight, Packed) else (weight,)))
        ctx.save_for_backward(*saved)
        ctx.form, ctx.scale, ctx.shape = (weight[:2] if isinstance(weight, Packed) else None, scale, x.shape)
        if nothing_reads(ctx.needs_input_grad, saved):
            return x.new_zeros(*x.shape[:-1], B.shape[0])
        low = (z if C is None else z @ C.to(x.dtype).T) * scale
        y = product(rows, weight, low, B.to(x.dtype), bias, forward=True)
        return y.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        source, A, C, B, *frozen = ctx.saved_tensors
        weight = frozen[0] if ctx.form is None else Packed(*ctx.form, *frozen)
        needs_x, _, needs_a, needs_c, needs_b, *_ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        a, b, c = A.to(dy.dtype), B.to(dy.dtype), None if C is None else C.to(dy.dtype)
        # rank r wide: dzc is the gradient of z Cᵀ, dz of z = x Aᵀ
        dzc = (dy @ b).mul_(ctx.scale)
        dz = dzc if c is None else dzc @ c
        z = None if not (needs_c or needs_b) else source @ a.T if needs_a else source
        dx = dA = dC = dB = None
        if needs_x:
            dx = product(dy, weight, dz, a.T, forward=False).view(ctx.shape)
        if needs_a:
            dA = (dz.T @ source).to(A.dtype)
        if needs_c:
            dC = (dzc.T @ z).to(C.dtype)
        if needs_b:
            dB = (dy.T @ (z if c is None else z @ c.T)).to(B.dtype).mul_(ctx.scale)
        return dx, None, dA, dC, dB, None, None
