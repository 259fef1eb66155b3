"""A frozen linear layer with a low-rank adapter.

    y = x Wᵀ + scale · ((x Aᵀ) Cᵀ) Bᵀ (+ bias)

    dx = dy W + scale · ((dy B) C) A        dA = scale · ((dy B) C)ᵀ x
    dC = scale · (dy B)ᵀ (x Aᵀ)             dB = scale · dyᵀ ((x Aᵀ) Cᵀ)

Kept for backward: x, and the factors in x's type. x Aᵀ is computed again. Every product but the frozen one has rank r.
Source: Hu et al. 2021, arXiv 2106.09685, with a square core C between the factors.
"""

import torch


def adapter_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    C: torch.Tensor | None,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the layer.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        weight: (out, in) frozen, of x's dtype.
        A: (r, in), C: (r, r) or None for the identity, B: (out, r); any float dtype, their gradients have it too.
        scale: alpha / r.
        bias: (out,) frozen, or None.

    Returns:
        (..., out) of x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together; the argument is named.
    """
    out, into = weight.shape
    rank = A.shape[0]
    if x.shape[-1] != into:
        raise ValueError(f"x has rows of {x.shape[-1]} but weight reads {into}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}: hold them in one type")
    for name, factor, needed in (("A", A, (rank, into)), ("C", C, (rank, rank)), ("B", B, (out, rank))):
        if factor is not None and tuple(factor.shape) != needed:
            raise ValueError(f"{name} is {tuple(factor.shape)} but has to be {needed}")
    y: torch.Tensor = _AdapterLinear.apply(x, weight, A, C, B, scale, bias)
    return y


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, C, B, scale, bias):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        a, b = A.to(x.dtype), (scale * B).to(x.dtype)
        c = None if C is None else C.to(x.dtype)
        y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        z = rows @ a.T
        y.addmm_(z if c is None else z @ c.T, b.T)
        ctx.save_for_backward(rows, weight, a, c, b)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (A.dtype, None if C is None else C.dtype, B.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        rows, weight, a, c, b = ctx.saved_tensors  # b carries the scale
        dy = dy.reshape(-1, dy.shape[-1])
        a_type, c_type, b_type = ctx.dtypes
        needs = ctx.needs_input_grad
        z = rows @ a.T if needs[3] or needs[4] else None
        dzc = dy @ b
        dz = dzc if c is None else dzc @ c
        dx = (dy @ weight).addmm_(dz, a).view(ctx.shape) if needs[0] else None
        dA = (dz.T @ rows).to(a_type) if needs[2] else None
        dC = (dzc.T @ z).to(c_type) if needs[3] else None
        dB = (dy.T @ (z if c is None else z @ c.T)).to(b_type).mul_(ctx.scale) if needs[4] else None
        return dx, None, dA, dC, dB, None, None
