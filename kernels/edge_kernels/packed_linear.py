"""A frozen linear layer whose matrix stays packed.

    y = x Wᵀ (+ bias)        dx = dy W

Kept for backward: the packed W alone. In Triton each tile of W is expanded where it is multiplied, in both directions, and
a product of low rank may ride in the same accumulator: `product` is what adapter_linear is made of, too. Where a grid of
tiles would leave the chip idle the contraction is split, and the parts, in float32, are added in a fixed order afterwards.
In torch one matrix at a time is expanded, used and dropped.
Source: Dettmers et al. 2023, arXiv 2305.14314, whose backward pass expands the matrix first.
"""

from functools import cache
from itertools import product as every
from typing import Any

import torch

from edge_kernels.backend import Launch, jit, on_triton, tl, triton
from edge_kernels.checkpoint_block import nothing_reads
from edge_kernels.quant import BLOCK, Packed, expand
from edge_kernels.tiles import check_packed, expand_tile, pointer_types, pointers

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
)  # the last in torch alone, for checks of gradients
TILE = 64  # rows and columns of W expanded at once: a block of nf4
SPLITS = 16  # at most; each has to have four tiles to walk


def packed_linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply the layer.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        packed: (out, in), from quant.pack or quant.from_gguf.
        bias: (out,) frozen, or None.

    Returns:
        (..., out) of x's dtype.

    Raises:
        ValueError: shapes, types or devices do not fit together, or a part of packed is not what its shape asks for.
    """
    check_frozen(x, packed, bias, "packed")
    y: torch.Tensor = _PackedLinear.apply(x, packed, bias)
    return y


def check_frozen(
    x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None, name: str
) -> None:
    """Refuse what a frozen layer cannot be applied to: ValueError, naming the argument."""
    if isinstance(weight, Packed):
        check_packed(name, weight)
    elif weight.dim() != 2:
        raise ValueError(f"{name} is {tuple(weight.shape)}, but has to be a matrix (out, in)")
    out, into = weight.shape
    device = weight.quants.device if isinstance(weight, Packed) else weight.device
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, but has to be float32, float16 or bfloat16")
    if x.dim() == 0 or x.shape[-1] != into:
        raise ValueError(f"x has rows of {x.shape[-1] if x.dim() else 0} but {name} reads {into}")
    if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} but {name} is {weight.dtype}: hold them in one type")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias is {tuple(bias.shape)} but has to be {(out,)}")
    if x.device != device:
        raise ValueError(f"x is on {x.device} but {name} on {device}")


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
    """left Wᵀ + low factorᵀ + bias, and backward left W + low factorᵀ.

    Args:
        left: (rows, in) forward, (rows, out) backward.
        weight: (out, in). A dense one is torch's: the products are the library's own, and those of low rank are few.
        low, factor: (rows, r) and (columns of the result, r) of left's dtype, or neither.
    """
    if isinstance(weight, Packed) and on_triton(left) and len(left) and left.dtype != torch.float64:
        return _product_triton(left, weight, low, factor, bias, forward)
    return _product_torch(left, weight, low, factor, bias, forward)


# --- torch


def _product_torch(left, weight, low, factor, bias, forward):  # type: ignore[no-untyped-def]
    matrix = expand(weight, left.dtype) if isinstance(weight, Packed) else weight
    matrix = matrix.T if forward else matrix
    result = left @ matrix if bias is None else torch.addmm(bias.to(left.dtype), left, matrix)
    return result if low is None else result.addmm_(low, factor.T)


# --- triton


def _product_triton(left, packed, low, factor, bias, forward):  # type: ignore[no-untyped-def]
    left, (out, into) = left.contiguous(), packed.shape
    rows, contraction, columns = len(left), *((into, out) if forward else (out, into))
    rank = 0 if low is None else low.shape[1]
    how = _tile(rows, left.dtype)
    programs = triton.cdiv(rows, how["M"]) * triton.cdiv(columns, TILE)
    steps = triton.cdiv(contraction, TILE)
    splits = max(1, min(2 * _processors(left.device) // programs, steps // 4, SPLITS))
    deep = triton.cdiv(steps, splits) * TILE  # of the contraction, a split
    splits = triton.cdiv(contraction, deep)
    result = left.new_empty(splits, rows, columns, dtype=torch.float32 if splits > 1 else left.dtype)
    low, factor = (left, left) if low is None else (low.contiguous(), factor)
    sizes = (rows, out, into, rank, *factor.stride(), deep)
    _product_kernel[(programs, splits)](
        *(left, *pointers(packed), low, factor, left if bias is None else bias.contiguous(), result),
        *sizes,
        FORMAT=packed.format,
        FORWARD=forward,
        BIASED=bias is not None,
        **how,
    )
    return result[0] if splits == 1 else result.sum(0).to(left.dtype)


def _tile(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """M rows by TILE columns. A tile of W is expanded once for M rows, so M is as large as registers let it be."""
    tensor_cores = dtype != torch.float32  # without them a product takes more registers
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
    deep,
    FORMAT: tl.constexpr,
    FORWARD: tl.constexpr,
    BIASED: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
):
    """A tile of the result from one split of the contraction; the first adds what does not depend on W."""
    contraction = into if FORWARD else out
    columns = out if FORWARD else into
    blocks = tl.cdiv(rows, M)  # programs that read the same part of W follow one another
    row = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    begin = tl.program_id(0) // blocks * T
    column = begin + tl.arange(0, T)
    split = tl.program_id(1)
    left_row = tl.minimum(row, rows - 1).to(tl.int64) * contraction
    tile = tl.zeros((M, T), tl.float32)
    for first in range(split * deep, tl.minimum(split * deep + deep, contraction), T):
        k = first + tl.arange(0, T)
        left = tl.load(left_ptr + left_row[:, None] + k[None, :], mask=k[None, :] < contraction, other=0.0)
        # rows past the end repeat the last one: forward they are not stored, backward they meet a zero of left
        weight_row = tl.minimum(column if FORWARD else k, out - 1).to(tl.int64)
        weight = expand_tile(
            quants_ptr,
            scales_ptr,
            mins_ptr,
            groups_ptr,
            offset_ptr,
            tables_ptr,
            weight_row,
            first if FORWARD else begin,
            into,
            FORMAT,
            T,
            T,
        ).to(left.dtype)
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


def ahead_of_time(capability: int) -> list[Launch]:
    """Every configuration that the launches above choose; forward with a bias, which only adds to them."""
    launches = []
    dtypes = (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for (name, dtype), format, rows, forward in every(dtypes, BLOCK, (16, 17), (True, False)):
        how = _tile(rows, dtype)
        if rows > 16 and how == _tile(16, dtype):
            continue
        warps, stages = how.pop("num_warps"), how.pop("num_stages")
        signature = {"left_ptr": f"*{name}", **pointer_types(format), "low_ptr": f"*{name}"}
        signature |= {"factor_ptr": f"*{name}", "bias_ptr": f"*{name}", "result_ptr": "*fp32"}
        signature |= dict.fromkeys(
            ("rows", "out", "into", "rank", "factor_column", "factor_rank", "deep"), "i32"
        )
        constants = {"FORMAT": format, "FORWARD": forward, "BIASED": forward, **how}
        label = f"packed_linear {name} {format} {'forward' if forward else 'backward'} M={how['M']}"
        widths = ("out", "into", "deep")
        launches.append(
            Launch(label, _product_kernel, signature, constants, warps, stages, widths, streamed=True)
        )
    return launches
