"""A kernel's access to a frozen matrix, dense or packed: pointers, and one tile expanded.

The layouts are those of `quant`. A tile of four-bit quants is joined, the low halves of a block
before the high halves, so that columns keep their order. The values of nf4 and the 256 levels of
its scales come from one small table in memory.
"""

from functools import cache
from typing import Any

import torch

from edge_kernels.backend import blank, jit, tl
from edge_kernels.quant import BLOCK, GROUP, NF4, Packed, dynamic_map

Part = tuple[tuple[int, ...], torch.dtype] | None


def check_packed(name: str, packed: Packed) -> None:
    """Check that the parts of a packed matrix fit its format and shape.

    Raises:
        ValueError: a part has a wrong shape, dtype or device; the message names the part.
    """
    if packed.format not in BLOCK:
        raise ValueError(f"{name}.format is {packed.format!r}, but has to be one of {', '.join(BLOCK)}")
    out, into = packed.shape
    for part, needed in _parts(packed.format, packed.shape).items():
        tensor = getattr(packed, part)
        actual = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        if actual != needed:
            raise ValueError(
                f"{name}.{part} is {actual}, but {packed.format} of {out} x {into} needs {needed}"
            )
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"{name}.{part} is on {tensor.device} but {name}.quants on {packed.device}")


def _parts(format: str, shape: tuple[int, int]) -> dict[str, Part]:
    """Shape and dtype of each tensor of a packed matrix; None for one that the format lacks."""
    (out, into), size, nf4 = shape, BLOCK[format], format == "nf4"
    blocks = -(-into // size)
    scale: Part = (out, blocks), torch.uint8 if nf4 else torch.float16
    byte: Part = (out, blocks * size), torch.int8
    half: Part = (out, blocks * size // 2), torch.uint8
    return {
        "quants": byte if format == "q8_0" else half,
        "scales": scale,
        "mins": scale if format == "q4_1" else None,
        "groups": ((-(-out * blocks // GROUP),), torch.float32) if nf4 else None,
        "offset": ((), torch.float32) if nf4 else None,
    }


def blank_packed(format: Any, out: int, into: int) -> Packed:
    """A packed matrix without memory, for a Launch."""
    parts = _parts(format, (out, into)).values()
    return Packed(format, (out, into), *(part and blank(part[1], *part[0]) for part in parts))


def pointers(weight: torch.Tensor | Packed) -> list[torch.Tensor]:
    """quants, scales, mins, groups, offset, tables; some other tensor stands for an absent part."""
    if isinstance(weight, torch.Tensor):
        return [weight] * 6
    parts = (*weight.parts, _tables(weight.device))
    return [weight.scales if part is None else part.contiguous() for part in parts]


@cache
def _tables(device: torch.device) -> torch.Tensor:
    return torch.cat((dynamic_map(), torch.tensor(NF4))).to(device)


@jit
def expand_tile(  # type: ignore[no-untyped-def]
    parts, row, first, width, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Columns first..first+COLUMNS of some rows, in a dense matrix's dtype, or else in float32.

    parts: the six `pointers`. row: (ROWS,) int64, inside the matrix. first and COLUMNS are
    multiples of a block. Columns from `width` on are zero for a dense matrix, and finite for a
    packed one.
    """
    quants_ptr, scales_ptr, mins_ptr, groups_ptr, offset_ptr, tables_ptr = parts
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
