"""Root-mean-square normalisation with a frozen weight.

    y = x · rstd · (weight + offset),   rstd = 1 / sqrt(mean(x²) + eps)   over the last axis
    dx = (g - x̂ · mean(g · x̂)) · rstd,   x̂ = x · rstd,   g = dy · (weight + offset)

Kept for backward: x, and rstd, one float32 a row. The weight is frozen and gets no gradient.
Source: Zhang & Sennrich 2019, arXiv 1910.07467. offset=1 is Gemma's form.
"""

from itertools import product

import torch

from edge_kernels.backend import DTYPES, Launch, blank, jit, on_triton, row_pieces, row_tile, tl, triton

# Values that the torch backend holds in float32 at a time: they fit a core's cache, and the heap
# serves and reuses them as one small piece.
PIECE = 1 << 17


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    """Normalise the rows of x.

    Args:
        x: (..., n) float32, float16 or bfloat16.
        weight: (n,) frozen scale, any of those dtypes.
        eps: added to the mean square.
        offset: added to the weight.

    Returns:
        A tensor shaped and typed like x.

    Raises:
        ValueError: the last axis of x and weight differ in length, or eps is not above 0.
    """
    check_norm(x, weight, eps)
    y: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset)
    return y


def check_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Check the arguments of a norm over the last axis.

    Raises:
        ValueError: the norm cannot be applied; the message names the argument.
    """
    if x.dim() == 0 or weight.dim() != 1 or x.shape[-1] != len(weight):
        raise ValueError(
            f"x is {tuple(x.shape)} but weight {tuple(weight.shape)}: x's last axis has to be weight's"
        )
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, but has to be of a float type")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but weight on {weight.device}")
    if not eps > 0:
        raise ValueError(f"eps is {eps}, but has to be above 0")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        backend = _forward_triton if on_triton(x) and len(rows) else _forward_torch
        y, rstd = backend(rows, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        backend = _backward_triton if on_triton(x) and len(rows) else _backward_torch
        dx = backend(dy.reshape(rows.shape), rows, weight, rstd, ctx.offset)
        return dx.view(x.shape), None, None, None


# --- torch: a piece of the rows in float32 at a time


def _forward_torch(x, weight, eps, offset):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(x.dtype, torch.float32)
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(len(x), dtype=wide)
    weight = weight.to(wide) + offset
    for rows in row_pieces(x.shape, PIECE):
        piece = x[rows].to(wide)
        rstd[rows] = (torch.linalg.vecdot(piece, piece) / x.shape[1]).add_(eps).rsqrt_()
        y[rows] = (piece * rstd[rows, None]).mul_(weight)
    return y, rstd


def _backward_torch(dy, x, weight, rstd, offset):  # type: ignore[no-untyped-def]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight = weight.to(rstd.dtype) + offset
    for rows in row_pieces(x.shape, PIECE):
        x_hat, g = x[rows] * rstd[rows, None], dy[rows] * weight
        mean = torch.linalg.vecdot(g, x_hat) / x.shape[1]
        dx[rows] = g.addcmul_(x_hat, mean[:, None], value=-1).mul_(rstd[rows, None])
    return dx


# --- triton: each program has a tile of whole rows


def _forward_triton(x, weight, eps, offset):  # type: ignore[no-untyped-def]
    x, tile = x.contiguous(), row_tile(x.shape[1])
    y, rstd = torch.empty_like(x), torch.empty(len(x), device=x.device)
    _forward_kernel[(triton.cdiv(len(x), tile["ROWS"]),)](x, weight, y, rstd, *x.shape, eps, offset, **tile)
    return y, rstd


def _backward_triton(dy, x, weight, rstd, offset):  # type: ignore[no-untyped-def]
    x, tile = x.contiguous(), row_tile(x.shape[1])
    dx = torch.empty_like(x)
    grid = (triton.cdiv(len(x), tile["ROWS"]),)
    _backward_kernel[grid](dy.contiguous(), x, weight, rstd, dx, *x.shape, offset, **tile)
    return dx


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, y_ptr, rstd_ptr, count, n, eps, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < count) & (columns[None, :] < n)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32) + offset
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / n + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < count)
    tl.store(y_ptr + at, x * rstd[:, None] * weight[None, :], mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, count, n, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < count) & (columns[None, :] < n)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)[:, None]
    x_hat = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32) + offset
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
    mean = tl.sum(g * x_hat, axis=1) / n
    tl.store(dx_ptr + at, (g - x_hat * mean[:, None]) * rstd, mask=inside)


# of a head whose keys are normalised; of the hidden states of 7 and of 70 billion parameters
WIDTHS = (64, 4096, 8192)


def ahead_of_time() -> list[Launch]:
    """Narrow and wide rows, forward and backward."""
    launches = []
    for (name, dtype), n in product(DTYPES.items(), WIDTHS):
        x, weight, rstd = blank(dtype, 17, n), blank(dtype, n), blank(torch.float32, 17)
        label = f"rms_norm {name} {n}"
        launches += [
            Launch(f"{label} forward", _forward_triton, (x, weight, 1e-6, 0.0)),
            Launch(f"{label} backward", _backward_triton, (x, x, weight, rstd, 0.0)),
        ]
    return launches
