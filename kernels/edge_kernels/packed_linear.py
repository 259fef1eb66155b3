"""A frozen linear layer whose matrix stays packed.

    y = x Wᵀ (+ bias)        dx = dy W

Kept for backward: the packed W alone. In Triton each tile of W is expanded where it is multiplied,
in both directions. A product of low rank can be added in the same accumulator, which is how
adapter_linear uses `product`. Where a grid of tiles would leave processors idle, the contraction is
split; the parts, in float32, are added afterwards in a fixed order. In torch one matrix at a time
is expanded, used and freed. Source: Dettmers et al. 2023, arXiv 2305.14314, whose backward pass
expands the matrix first.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product as combinations
from typing import Any

import torch

from edge_kernels import backend
from edge_kernels.backend import Launch, blank, jit, on_triton, tl, triton
from edge_kernels.checkpoint_block import nothing_reads
from edge_kernels.quant import BLOCK, Packed, expand
from edge_kernels.tiles import blank_packed, check_packed, expand_tile, pointers

# float64 runs in torch alone, for checks of gradients
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TILE = 64  # rows and columns of W expanded at once: a block of nf4
SPLITS = 16  # at most; each split has at least four tiles of the contraction


def packed_linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply the layer; the result is (..., out) of x's dtype.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        packed: (out, in), made by quant.pack or quant.from_gguf.
        bias: (out,) frozen, or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a part of packed does not fit
            its shape.
    """
    check_frozen(x, packed, bias, "packed")
    y: torch.Tensor = _PackedLinear.apply(x, packed, bias)
    return y


def check_frozen(
    x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None, name: str
) -> None:
    """Check the arguments of a frozen layer.

    Raises:
        ValueError: the layer cannot be applied; the message names the argument.
    """
    if isinstance(weight, Packed):
        check_packed(name, weight)
    elif weight.dim() != 2:
        raise ValueError(f"{name} is {tuple(weight.shape)}, but has to be a matrix (out, in)")
    out, into = weight.shape
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, but has to be float32, float16 or bfloat16")
    if x.dim() == 0 or x.shape[-1] != into:
        raise ValueError(f"x has rows of {x.shape[-1] if x.dim() else 0} but {name} reads {into}")
    if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} but {name} is {weight.dtype}: they need one dtype")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias is {tuple(bias.shape)} but has to be {(out,)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but {name} on {weight.device}")


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*packed.parts)
        ctx.form = packed[:2]
        if nothing_reads(ctx.needs_input_grad, packed.parts):
            return x.new_zeros(*x.shape[:-1], packed.shape[0])
        y = product(x.reshape(-1, x.shape[-1]), packed, bias=bias, forward=True)
        return y.view(*x.shape[:-1], packed.shape[0])

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        packed = Packed(*ctx.form, *ctx.saved_tensors)
        dx = product(dy.reshape(-1, dy.shape[-1]), packed, forward=False)
        return dx.view(*dy.shape[:-1], packed.shape[1]), None, None


def product(
    left: torch.Tensor,
    weight: torch.Tensor | Packed,
    low: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    forward: bool,
) -> torch.Tensor:
    """left Wᵀ + low factorᵀ + bias forward; left W + low factorᵀ backward.

    Args:
        left: (rows, in) forward, (rows, out) backward; the result is the other, of left's dtype.
        weight: (out, in). A dense matrix is multiplied in torch: the library's product is the best
            there.
        low: (rows, r) of left's dtype, or None.
        factor: (columns of the result, r) of left's dtype, or None.
        bias: (out,) forward, or None.
        forward: whether W is transposed.
    """
    if isinstance(weight, Packed) and on_triton(left) and left.dtype != torch.float64:
        result: torch.Tensor = _product_triton(left, weight, low, factor, bias, forward)
        return result
    matrix = expand(weight, left.dtype) if isinstance(weight, Packed) else weight
    matrix = matrix.T if forward else matrix
    result = left @ matrix if bias is None else torch.addmm(bias.to(left.dtype), left, matrix)
    return result if factor is None else result.addmm_(low, factor.T)


def _product_triton(left, packed, low, factor, bias, forward):  # type: ignore[no-untyped-def]
    left, (out, into) = left.contiguous(), packed.shape
    rows, contraction, columns = len(left), *((into, out) if forward else (out, into))
    rank = 0 if low is None else low.shape[1]
    tile = _tile(rows, left.dtype)
    programs = triton.cdiv(rows, tile["M"]) * triton.cdiv(columns, TILE)
    steps = triton.cdiv(contraction, TILE)
    # two programs a processor keep the machine busy; a split needs enough work of its own
    splits = max(1, min(2 * _processors(left.device) // programs, steps // 4, SPLITS))
    depth = triton.cdiv(steps, splits) * TILE  # of the contraction in a split
    splits = triton.cdiv(contraction, depth)
    result = left.new_empty(splits, rows, columns, dtype=torch.float32 if splits > 1 else left.dtype)
    low, factor = (left, left) if low is None else (low.contiguous(), factor)
    sizes = (rows, out, into, rank, *factor.stride(), depth)
    _product_kernel[(programs, splits)](
        *(left, *pointers(packed), low, factor, left if bias is None else bias.contiguous(), result),
        *sizes,
        FORMAT=packed.format,
        FORWARD=forward,
        BIASED=bias is not None,
        **tile,
    )
    return result[0] if splits == 1 else result.sum(0).to(left.dtype)


def _tile(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch options of a tile of M rows by TILE columns.

    A tile of W is expanded once for M rows, so M is as large as the registers allow.
    """
    tensor_cores = dtype != torch.float32  # without them a product needs more registers
    return {
        "M": 64 if rows > 16 and tensor_cores else 16,
        "T": TILE,
        "R": 16,
        "num_warps": 8,
        "num_stages": 3 if tensor_cores else 2,
    }


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@jit
def _product_kernel(  # type: ignore[no-untyped-def]
    left_ptr,
    quants_ptr,
    scales_ptr,
    mins_ptr,
    groups_ptr,
    offset_ptr,
    tables_ptr,
    low_ptr,
    factor_ptr,
    bias_ptr,
    result_ptr,
    rows,
    out,
    into,
    rank,
    factor_column,
    factor_rank,
    depth,
    FORMAT: tl.constexpr,
    FORWARD: tl.constexpr,
    BIASED: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
):
    """A tile of one split of the contraction; the first split adds low factorᵀ and bias."""
    parts = quants_ptr, scales_ptr, mins_ptr, groups_ptr, offset_ptr, tables_ptr
    contraction = into if FORWARD else out
    columns = out if FORWARD else into
    blocks = tl.cdiv(rows, M)  # programs that read the same part of W are neighbours
    row = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    begin = tl.program_id(0) // blocks * T
    column = begin + tl.arange(0, T)
    split = tl.program_id(1)
    left_row = tl.minimum(row, rows - 1).to(tl.int64) * contraction
    tile = tl.zeros((M, T), tl.float32)
    for first in range(split * depth, tl.minimum(split * depth + depth, contraction), T):
        k = first + tl.arange(0, T)
        left = tl.load(left_ptr + left_row[:, None] + k[None, :], mask=k[None, :] < contraction, other=0.0)
        # Rows beyond the end repeat the last row. Forward, their results are not stored; backward,
        # they are multiplied with zeros of left.
        weight_row = tl.minimum(column if FORWARD else k, out - 1).to(tl.int64)
        weight_first = first if FORWARD else begin
        weight = expand_tile(parts, weight_row, weight_first, into, FORMAT, T, T).to(left.dtype)
        if FORWARD:
            weight = weight.T
        tile = tl.dot(left, weight, tile, input_precision="ieee")
    inside = row[:, None] < rows
    within = column < columns
    if split == 0:
        for first in range(0, rank, R):
            r = first + tl.arange(0, R)
            where = row.to(tl.int64)[:, None] * rank + r[None, :]
            low = tl.load(low_ptr + where, mask=inside & (r[None, :] < rank), other=0.0)
            where = column.to(tl.int64)[None, :] * factor_column + r[:, None] * factor_rank
            factor = tl.load(factor_ptr + where, mask=within[None, :] & (r[:, None] < rank), other=0.0)
            tile = tl.dot(low, factor, tile, input_precision="ieee")
        if BIASED:
            tile += tl.load(bias_ptr + column, mask=within, other=0.0).to(tl.float32)[None, :]
    at = (split.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(result_ptr + at, tile, mask=inside & within[None, :])


def ahead_of_time() -> Iterator[Launch]:
    """Every tile, format and direction, with an adapter, splits and, forward, a bias."""
    for (name, dtype), format, rows, forward in combinations(
        backend.DTYPES.items(), BLOCK, (5, 17), (True, False)
    ):
        tile = _tile(rows, dtype)
        if rows > 16 and tile == _tile(16, dtype):
            continue
        left, low, weight = blank(dtype, rows, 1024), blank(dtype, rows, 5), blank_packed(format, 1024, 1024)
        factor = blank(dtype, 1024, 5) if forward else blank(dtype, 5, 1024).T  # B, or A transposed
        bias = blank(dtype, 1024) if forward else None
        label = f"packed_linear {name} {format} {'forward' if forward else 'backward'} M={tile['M']}"
        arguments = (left, weight, low, factor, bias, forward)
        yield Launch(label, _product_triton, arguments, streamed=True)
