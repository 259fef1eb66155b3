"""Layer normalisation with frozen weight and bias.

    y = x̂ · weight + bias,   x̂ = (x - mean(x)) · rstd,   rstd = 1 / sqrt(var(x) + eps)
    dx = (g - mean(g) - x̂ · mean(g · x̂)) · rstd,   g = dy · weight

Mean and variance are over the last axis.
Kept for backward: x, and mean and rstd, one float32 a row each. Weight and bias are frozen and get
no gradient.
Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450.
"""

from itertools import product

import torch

from edge_kernels.backend import DTYPES, Launch, blank, jit, on_triton, row_tile, tl, triton
from edge_kernels.rms_norm import WIDTHS, check_norm


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise the rows of x.

    Args:
        x: (..., n) float32, float16 or bfloat16.
        weight: (n,) frozen scale, of x's dtype.
        bias: (n,) frozen, of x's dtype, or None.
        eps: added to the variance.

    Returns:
        A tensor shaped and typed like x.

    Raises:
        ValueError: the last axis of x, weight and bias differ in length or type, or eps is not
            above 0.
    """
    check_norm(x, weight, eps)
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(
            f"bias is {tuple(bias.shape)} but weight {tuple(weight.shape)}: their shapes have to be equal"
        )
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and part.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} but {name} is {part.dtype}: they need one dtype")
    y: torch.Tensor = _LayerNorm.apply(x, weight, bias, eps)
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        backend = _forward_triton if on_triton(x) and len(rows) else _forward_torch
        y, mean, rstd = backend(rows, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        backend = _backward_triton if on_triton(x) and len(rows) else _backward_torch
        dx = backend(dy.reshape(rows.shape), rows, weight, bias, mean, rstd)
        return dx.view(x.shape), None, None, None


# --- torch: its own kernels make one pass each and keep the same tensors


def _forward_torch(x, weight, bias, eps):  # type: ignore[no-untyped-def]
    return torch.native_layer_norm(x.contiguous(), (x.shape[1],), weight, bias, eps)


def _backward_torch(dy, x, weight, bias, mean, rstd):  # type: ignore[no-untyped-def]
    shape, only_x = (x.shape[1],), [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(), x.contiguous(), shape, mean, rstd, weight, bias, only_x
    )[0]


# --- triton: each program has a tile of whole rows


def _forward_triton(x, weight, bias, eps):  # type: ignore[no-untyped-def]
    x, tile = x.contiguous(), row_tile(x.shape[1])
    y = torch.empty_like(x)
    mean, rstd = torch.empty(2, len(x), device=x.device).unbind()
    _forward_kernel[(triton.cdiv(len(x), tile["ROWS"]),)](
        *(x, weight, x if bias is None else bias, y, mean, rstd, *x.shape, eps),
        BIASED=bias is not None,
        **tile,
    )
    return y, mean, rstd


def _backward_triton(dy, x, weight, _bias, mean, rstd):  # type: ignore[no-untyped-def]
    x, tile = x.contiguous(), row_tile(x.shape[1])
    dx = torch.empty_like(x)
    grid = (triton.cdiv(len(x), tile["ROWS"]),)
    _backward_kernel[grid](dy.contiguous(), x, weight, mean, rstd, dx, *x.shape, **tile)
    return dx


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    count,
    n,
    eps,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < count) & (columns[None, :] < n)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / n
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n + eps)
    y = centred * rstd[:, None] * weight[None, :]
    if BIASED:
        y += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(mean_ptr + rows, mean, mask=rows < count)
    tl.store(rstd_ptr + rows, rstd, mask=rows < count)
    tl.store(y_ptr + at, y, mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, count, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < count) & (columns[None, :] < n)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    mean = tl.load(mean_ptr + rows, mask=rows < count, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)[:, None]
    x_hat = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    x_hat = tl.where(inside, x_hat, 0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
    mean_g, mean_gx = tl.sum(g, axis=1) / n, tl.sum(g * x_hat, axis=1) / n
    tl.store(dx_ptr + at, (g - mean_g[:, None] - x_hat * mean_gx[:, None]) * rstd, mask=inside)


def ahead_of_time() -> list[Launch]:
    """Narrow and wide rows, forward with a bias and backward."""
    launches = []
    for (name, dtype), n in product(DTYPES.items(), WIDTHS):
        x, weight, rstd = blank(dtype, 17, n), blank(dtype, n), blank(torch.float32, 17)
        label = f"layer_norm {name} {n}"
        launches += [
            Launch(f"{label} forward", _forward_triton, (x, weight, weight, 1e-5)),
            Launch(f"{label} backward", _backward_triton, (x, x, weight, weight, rstd, rstd)),
        ]
    return launches
