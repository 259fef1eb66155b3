"""Normalisation of rows with a frozen weight: the root-mean-square norm and the layer norm.

    y = x̂ · (weight + offset) + bias,  x̂ = (x - μ) · rstd,  rstd = 1 / sqrt(mean((x - μ)²) + eps)
    dx = (g - γ - x̂ · mean(g · x̂)) · rstd,  g = dy · (weight + offset)

    layer_norm    μ = mean(x) and γ = mean(g), over the last axis; no offset
    rms_norm      μ = γ = 0; no bias

Kept for backward: x, rstd, and layer_norm's μ; rstd and μ are one float32 a row. Weight and bias
are frozen and get no gradient. Source: Zhang & Sennrich 2019, arXiv 1910.07467 (rms_norm;
offset=1 is Gemma's form); Ba, Kiros & Hinton 2016, arXiv 1607.06450 (layer_norm).
"""

from collections.abc import Iterator
from itertools import product

import torch

from edge_kernels.backend import DTYPES, Launch, blank, jit, on_triton, row_pieces, tl, triton

# Values that the torch backend holds in float32 at a time: they fit a core's cache, and the heap
# serves and reuses them as one small piece.
PIECE = 1 << 17


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    """Normalise the rows of x by their root mean square; the result is shaped and typed like x.

    Args:
        x: (..., n) float32, float16 or bfloat16.
        weight: (n,) frozen scale, any of those dtypes.
        eps: added to the mean square.
        offset: added to the weight.

    Raises:
        ValueError: the last axis of x and weight differ in length, or eps is not above 0.
    """
    _check(x, weight, eps)
    y: torch.Tensor = _Norm.apply(x, weight, None, eps, offset, False)
    return y


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise the rows of x to mean 0 and variance 1; the result is shaped and typed like x.

    Args:
        x: (..., n) float32, float16 or bfloat16.
        weight: (n,) frozen scale, of x's dtype.
        bias: (n,) frozen, of x's dtype, or None.
        eps: added to the variance.

    Raises:
        ValueError: the last axis of x, weight and bias differ in length or type, or eps is not
            above 0.
    """
    _check(x, weight, eps)
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(
            f"bias is {tuple(bias.shape)} but weight {tuple(weight.shape)}: their shapes have to be equal"
        )
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and part.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} but {name} is {part.dtype}: they need one dtype")
    y: torch.Tensor = _Norm.apply(x, weight, bias, eps, 0.0, True)
    return y


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
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


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, offset, centred):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        backend = _forward_triton if on_triton(x) else _forward_torch
        y, mean, rstd = backend(rows, weight, bias, eps, offset, centred)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, mean, rstd = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        backend = _backward_triton if on_triton(x) else _backward_torch
        dx = backend(dy.reshape(rows.shape), rows, weight, mean, rstd, ctx.offset)
        return dx.view(x.shape), None, None, None, None, None


# --- torch: its own kernels for layer_norm; for rms_norm a piece of the rows in float32 at a time


def _forward_torch(x, weight, bias, eps, offset, centred):  # type: ignore[no-untyped-def]
    if centred:
        return torch.native_layer_norm(x.contiguous(), (x.shape[1],), weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(len(x), dtype=wide)
    weight = weight.to(wide) + offset
    for rows in row_pieces(x.shape, PIECE):
        piece = x[rows].to(wide)
        rstd[rows] = (torch.linalg.vecdot(piece, piece) / x.shape[1]).add_(eps).rsqrt_()
        y[rows] = (piece * rstd[rows, None]).mul_(weight)
    return y, None, rstd


def _backward_torch(dy, x, weight, mean, rstd, offset):  # type: ignore[no-untyped-def]
    if mean is not None:
        dy, x, shape, only_x = dy.contiguous(), x.contiguous(), (x.shape[1],), [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, None, only_x)[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight = weight.to(rstd.dtype) + offset
    for rows in row_pieces(x.shape, PIECE):
        x_hat, g = x[rows] * rstd[rows, None], dy[rows] * weight
        mean_gx = torch.linalg.vecdot(g, x_hat) / x.shape[1]
        dx[rows] = g.addcmul_(x_hat, mean_gx[:, None], value=-1).mul_(rstd[rows, None])
    return dx


# --- triton: each program has a tile of whole rows


def _forward_triton(x, weight, bias, eps, offset, centred):  # type: ignore[no-untyped-def]
    x, tile = x.contiguous(), _tile(x.shape[1])
    y, rstd = torch.empty_like(x), torch.empty(len(x), device=x.device)
    mean = torch.empty_like(rstd) if centred else None
    # some other tensor stands for an absent one
    tensors = x, weight, weight if bias is None else bias, y, mean if centred else rstd, rstd
    _forward_kernel[(triton.cdiv(len(x), tile["ROWS"]),)](
        *tensors, *x.shape, eps, offset, CENTRED=centred, BIASED=bias is not None, **tile
    )
    return y, mean, rstd


def _backward_triton(dy, x, weight, mean, rstd, offset):  # type: ignore[no-untyped-def]
    x, tile, centred = x.contiguous(), _tile(x.shape[1]), mean is not None
    dx = torch.empty_like(x)
    tensors = dy.contiguous(), x, weight, mean if centred else rstd, rstd, dx
    grid = (triton.cdiv(len(x), tile["ROWS"]),)
    _backward_kernel[grid](*tensors, *x.shape, offset, CENTRED=centred, **tile)
    return dx


def _tile(n: int) -> dict[str, int]:
    """Launch options: a tile of 2048 values, or one row of n."""
    columns = 1 << max(n - 1, 1).bit_length()
    rows = max(2048 // columns, 1)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(max(rows * columns // 512, 4), 16)}


@jit
def _positions(count, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows and columns; which of its places exist, and where they are in memory."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < count) & (columns[None, :] < n)
    return rows, columns, inside, rows.to(tl.int64)[:, None] * n + columns[None, :]


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
    offset,
    CENTRED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside, at = _positions(count, n, ROWS, COLUMNS)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32) + offset
    if CENTRED:
        mean = tl.sum(x, axis=1) / n
        tl.store(mean_ptr + rows, mean, mask=rows < count)
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / n + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < count)
    y = x * rstd[:, None] * weight[None, :]
    if BIASED:
        y += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y, mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    count,
    n,
    offset,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside, at = _positions(count, n, ROWS, COLUMNS)
    rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)[:, None]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.load(mean_ptr + rows, mask=rows < count, other=0.0)
        x = tl.where(inside, x - mean[:, None], 0.0)
    x_hat = x * rstd
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32) + offset
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
    mean_gx = tl.sum(g * x_hat, axis=1) / n
    if CENTRED:
        g -= (tl.sum(g, axis=1) / n)[:, None]
    tl.store(dx_ptr + at, (g - x_hat * mean_gx[:, None]) * rstd, mask=inside)


# of a head whose keys are normalised; of the hidden states of 7 and of 70 billion parameters
WIDTHS = (64, 4096, 8192)


def ahead_of_time() -> Iterator[Launch]:
    """Narrow and wide rows, forward (with layer_norm's bias) and backward."""
    for (name, dtype), n, centred in product(DTYPES.items(), WIDTHS, (False, True)):
        x, weight, rstd = blank(dtype, 17, n), blank(dtype, n), blank(torch.float32, 17)
        bias, mean = (weight, rstd) if centred else (None, None)
        label = f"{'layer' if centred else 'rms'}_norm {name} {n}"
        yield Launch(f"{label} forward", _forward_triton, (x, weight, bias, 1e-6, 0.0, centred))
        yield Launch(f"{label} backward", _backward_triton, (x, x, weight, mean, rstd, 0.0))
