"""What a kernel needs to read a frozen matrix, dense or packed: its parts as pointers, and the expansion of one tile.

The layouts are those of `quant`. A tile of four-bit quants is joined, low halves of a block before its high ones, so that
columns come in their order; nf4's values and the 256 levels of its scales come out of one small table in memory.
"""

from functools import cache

import torch

from edge_kernels.backend import jit, tl
from edge_kernels.quant import BLOCK, GROUP, NF4, Packed, dynamic_map


def check_packed(name: str, packed: Packed) -> None:
    """Refuse a packed matrix whose parts are not those that its format and shape ask for.

    Raises:
        ValueError: a part has another shape, type or device; the part is named.
    """
    if packed.format not in BLOCK:
        raise ValueError(f"{name}.format is {packed.format!r}, but has to be one of {', '.join(BLOCK)}")
    (out, into), size, nf4 = packed.shape, BLOCK[packed.format], packed.format == "nf4"
    blocks = -(-into // size)
    scale = (out, blocks), torch.uint8 if nf4 else torch.float16
    byte = (out, blocks * size), torch.int8
    half = (out, blocks * size // 2), torch.uint8
    needed = {
        "quants": byte if packed.format == "q8_0" else half,
        "scales": scale,
        "mins": scale if packed.format == "q4_1" else None,
        "groups": ((-(-out * blocks // GROUP),), torch.float32) if nf4 else None,
        "offset": ((), torch.float32) if nf4 else None,
    }
    for part, need in needed.items():
        tensor = getattr(packed, part)
        seen = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        if seen != need:
            raise ValueError(f"{name}.{part} is {seen}, but {packed.format} of {out} x {into} needs {need}")
        if tensor is not None and tensor.device != packed.quants.device:
            raise ValueError(
                f"{name}.{part} is on {tensor.device} but {name}.quants on {packed.quants.device}"
            )


def pointers(weight: torch.Tensor | Packed) -> list[torch.Tensor]:
    """quants, scales, mins, groups, offset, tables; any tensor in the place of a part that the format has not."""
    if isinstance(weight, torch.Tensor):
        return [weight] * 6
    parts = (
        weight.quants,
        weight.scales,
        weight.mins,
        weight.groups,
        weight.offset,
        _tables(weight.quants.device),
    )
    return [weight.scales if part is None else part.contiguous() for part in parts]


def pointer_types(format: str) -> dict[str, str]:
    """The types of what `pointers` gives for a packed matrix, as a kernel's signature has them."""
    scales = "*u8" if format == "nf4" else "*fp16"
    second = "*fp32" if format == "nf4" else scales
    names = ("quants_ptr", "scales_ptr", "mins_ptr", "groups_ptr", "offset_ptr", "tables_ptr")
    types = ("*i8" if format == "q8_0" else "*u8", scales, scales, second, second, "*fp32")
    return dict(zip(names, types, strict=True))


@cache
def _tables(device: torch.device) -> torch.Tensor:
    return torch.cat((dynamic_map(), torch.tensor(NF4))).to(device)


@jit
def expand_tile(  # type: ignore[no-untyped-def]
    quants_ptr,
    scales_ptr,
    mins_ptr,
    groups_ptr,
    offset_ptr,
    tables_ptr,
    row,
    first,
    width,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns first..first+COLUMNS of some rows (int64, inside the matrix), a dense matrix's in its type, else in float32.

    first and COLUMNS are multiples of a block. Columns past `width` are finite in a packed matrix, and zero in a dense one.
    """
    if FORMAT == "dense":
        column = first + tl.arange(0, COLUMNS)
        weight = tl.load(
            quants_ptr + row[:, None] * width + column[None, :], mask=column[None, :] < width, other=0.0
        )
    else:
        SIZE: tl.constexpr = 64 if FORMAT == "nf4" else 32
        BYTES: tl.constexpr = SIZE if FORMAT == "q8_0" else SIZE // 2
        BLOCKS: tl.constexpr = COLUMNS // SIZE
        blocks = tl.cdiv(width, SIZE)
        byte = first // SIZE * BYTES + tl.arange(0, BLOCKS * BYTES)
        inside = byte[None, :] < blocks * BYTES
        quants = tl.load(quants_ptr + row[:, None] * (blocks * BYTES) + byte[None, :], mask=inside, other=0)
        quants = quants.reshape(ROWS, BLOCKS, BYTES)
        if FORMAT != "q8_0":
            quants = tl.join(quants & 15, quants >> 4).permute(0, 1, 3, 2).reshape(ROWS, BLOCKS, SIZE)
        block = first // SIZE + tl.arange(0, BLOCKS)
        at = row[:, None] * blocks + block[None, :]
        inside = block[None, :] < blocks
        if FORMAT == "nf4":
            codes = tl.load(scales_ptr + at, mask=inside, other=0).to(tl.int32)
            groups = tl.load(groups_ptr + at // 256, mask=inside, other=0.0)
            scales = groups * tl.load(tables_ptr + codes) + tl.load(offset_ptr)
            weight = tl.load(tables_ptr + 256 + quants.to(tl.int32))
        else:
            scales = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
            weight = quants.to(tl.float32)
        if FORMAT == "q4_0":
            weight -= 8
        weight *= scales[:, :, None]
        if FORMAT == "q4_1":
            weight += tl.load(mins_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
        weight = weight.reshape(ROWS, COLUMNS)
    return weight
