"""Block formats of frozen matrices.

    q8_0    w = d · q             32 values a block, q in -127..127     8.5 bits a value
    q4_0    w = d · (q - 8)       32 values a block, q in 0..15         4.5
    q4_1    w = d · q + m         32 values a block, q in 0..15         5
    nf4     w = s · table[q]      64 values a block                     4.13
            s = offset + s2 · dynamic_map[code]

The first three are GGUF's blocks with their parts kept apart: all scales together and all quants
together, so that a kernel reads a tile in wide loads. d and m are float16. For nf4 the scales s are
quantised again (double quantisation): 256 codes share one float32 s2. Four-bit quants have GGUF's
order: the low halves of a block's bytes are its first half, the high halves its second half. A row
is padded to whole blocks.
Source: ggml's block formats; Dettmers et al. 2023, arXiv 2305.14314 (nf4); Dettmers et al. 2022,
arXiv 2110.02861 (dynamic map).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from edge_kernels.backend import row_pieces

Format = Literal["q8_0", "q4_0", "q4_1", "nf4"]
BLOCK: dict[str, int] = {"q8_0": 32, "q4_0": 32, "q4_1": 32, "nf4": 64}
# Values held in float32 at a time: they fit a core's cache, and the heap reuses them as one piece.
PIECE_VALUES = 1 << 18
EXPANDED_BYTES = 4 << 20  # of a packed matrix's rows that `expanded_rows` holds at a time
GROUP = 256  # nf4 scales that share a second-level scale
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


class Packed(NamedTuple):
    """A frozen matrix (out, in) in blocks along its rows.

    `padded` below is in, rounded up to whole blocks; `blocks` is the number of blocks in a row.
    """

    format: Format
    shape: tuple[int, int]
    quants: torch.Tensor  # (out, padded) int8 for q8_0, else (out, padded / 2) uint8
    scales: torch.Tensor  # (out, blocks) float16; for nf4 the scales' codes in uint8
    mins: torch.Tensor | None = None  # q4_1: (out, blocks) float16
    groups: torch.Tensor | None = None  # nf4: (ceil(out · blocks / GROUP),) float32, second-level scales
    offset: torch.Tensor | None = None  # nf4: () float32, added to every scale

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts if part is not None)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.quants.device

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors: autograd Functions save them, so a checkpointed block releases them."""
        return self[2:]

    def rows(self, index: slice | torch.Tensor) -> "Packed":
        """Some of the rows; of nf4 a slice from a multiple of GROUP, so that groups stay whole."""
        groups, mins = self.groups, None if self.mins is None else self.mins[index]
        if groups is not None:
            assert isinstance(index, slice) and index.start % GROUP == 0, (
                f"nf4 rows {index} do not start at a group"
            )
            groups = groups[index.start * self.scales.shape[1] // GROUP :]
        quants, scales = self.quants[index], self.scales[index]
        return Packed(self.format, (len(quants), self.shape[1]), quants, scales, mins, groups, self.offset)

    def to(self, device: torch.device | str) -> "Packed":
        """The same matrix on another device."""
        return Packed(
            self.format, self.shape, *(None if part is None else part.to(device) for part in self.parts)
        )


def pack(weight: torch.Tensor, format: Format) -> Packed:
    """Round a matrix to a block format.

    Args:
        weight: (out, in) of any float dtype.
        format: one of the formats above.

    Raises:
        ValueError: the weight is not a matrix, has a value that is not finite, or needs a scale
            beyond float16's range.
    """
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"weight is {tuple(weight.shape)}, but has to be a matrix (out, in) that is not empty"
        )
    if format not in BLOCK:
        raise ValueError(f"format is {format!r}, but has to be one of {', '.join(BLOCK)}")
    out, into = weight.shape
    size = BLOCK[format]
    padded = torch.nn.functional.pad(weight.float()[None], (0, -into % size), mode="replicate")[0]
    blocks = padded.view(out, -1, size)
    if not blocks.isfinite().all():
        raise ValueError("weight holds a value that is not finite")
    packed = {"q8_0": _pack_q8_0, "q4_0": _pack_q4_0, "q4_1": _pack_q4_1, "nf4": _pack_nf4}[format](
        blocks, (out, into)
    )
    if not packed.scales.isfinite().all() or (packed.mins is not None and not packed.mins.isfinite().all()):
        raise ValueError(
            f"weight has values up to {float(weight.abs().max()):.3g}, too large for a float16 scale"
        )
    return packed


def expand(
    packed: Packed, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Expand a packed matrix to a float dtype; each value is rounded once, from float32.

    Args:
        packed: (out, in).
        dtype: of the result.
        out: (out, in) to write to, which also sets the dtype; one buffer can serve many matrices.
    """
    matrix = torch.empty(packed.shape, dtype=dtype, device=packed.device) if out is None else out
    for rows in row_pieces(packed.shape, PIECE_VALUES):
        matrix[rows] = _values(packed, rows)[:, : packed.shape[1]]
    return matrix


def expanded_rows(
    matrix: torch.Tensor | Packed, dtype: torch.dtype, rows: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Go through the rows of a large matrix in pieces; each piece reuses the memory of the last.

    A dense matrix comes in views. A packed one is expanded into one buffer of at most
    EXPANDED_BYTES, or GROUP rows where those are larger.

    Args:
        matrix: (out, in), dense or packed.
        dtype: of the pieces of a packed matrix; a dense one has its own.
        rows: that a piece may have; None: no limit. At least GROUP rows come at a time.

    Yields:
        The rows of the piece, and the piece (rows, in).
    """
    out, into = matrix.shape
    step = out if rows is None else max(rows, GROUP)
    if isinstance(matrix, Packed):
        step = max(min(step, EXPANDED_BYTES // (dtype.itemsize * into)) // GROUP, 1) * GROUP
        buffer = torch.empty(min(step, out), into, dtype=dtype, device=matrix.device)
    for first in range(0, out, step):
        piece = slice(first, min(first + step, out))
        if isinstance(matrix, Packed):
            yield piece, expand(matrix.rows(piece), out=buffer[: piece.stop - first])
        else:
            yield piece, matrix[piece]


def from_gguf(data: torch.Tensor, format: Literal["q8_0", "q4_0", "q4_1"], shape: tuple[int, int]) -> Packed:
    """Take a matrix from the blocks of a GGUF file; no value changes.

    Args:
        data: uint8, the tensor's bytes in the file.
        format: the tensor's type in the file.
        shape: (out, in); in is a multiple of 32, as GGUF demands.

    Raises:
        ValueError: the number of bytes does not fit the shape, or a scale is not finite.
    """
    out, into = shape
    width = {"q8_0": 34, "q4_0": 18, "q4_1": 20}[format]
    if into % 32 or data.numel() != out * (into // 32) * width:
        raise ValueError(
            f"data has {data.numel()} bytes, but {out} rows of {into} values in {format} have to be "
            f"{out * into // 32 * width}, in rows of whole blocks"
        )
    blocks = data.view(out, into // 32, width)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    mins = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0] if format == "q4_1" else None
    quants = blocks[..., 4 if format == "q4_1" else 2 :].reshape(out, -1)
    if not scales.isfinite().all() or (mins is not None and not mins.isfinite().all()):
        raise ValueError("data holds a block whose scale is not finite")
    return Packed(format, shape, quants.view(torch.int8) if format == "q8_0" else quants, scales, mins)


# --- the formats


def _values(packed: Packed, rows: slice) -> torch.Tensor:
    """A part of the rows in float32, padding included."""
    quants, size = packed.quants[rows], BLOCK[packed.format]
    if packed.format != "q8_0":
        # the inverse of _nibbles; sixteen bytes move as one complex number, eight times as fast as by byte
        shape = len(quants), -1, size // 2
        halves = (half.view(shape).view(torch.complex128) for half in (quants & 15, quants >> 4))
        quants = torch.stack(tuple(halves), -2).view(torch.uint8).view(len(quants), -1)
    values = (
        torch.tensor(NF4, device=quants.device)[quants.int()] if packed.format == "nf4" else quants.float()
    )
    values = values.view(len(quants), -1, size)
    if packed.format == "q4_0":
        values.sub_(8)
    values.mul_(_scales(packed, rows)[..., None])
    if packed.mins is not None:
        values.add_(packed.mins[rows][..., None])
    return values.flatten(1)


def _pack_q8_0(blocks: torch.Tensor, shape: tuple[int, int]) -> Packed:
    d = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(d)
    # ggml rounds halves away from zero
    quants = (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8)
    return Packed("q8_0", shape, quants.flatten(1), d[..., 0].half())


def _pack_q4_0(blocks: torch.Tensor, shape: tuple[int, int]) -> Packed:
    d = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8  # so the largest value becomes -8
    quants = (blocks * _inverse(d) + 8.5).to(torch.uint8).clamp_max(15)
    return Packed("q4_0", shape, _nibbles(quants), d[..., 0].half())


def _pack_q4_1(blocks: torch.Tensor, shape: tuple[int, int]) -> Packed:
    least = blocks.amin(-1, keepdim=True)
    d = (blocks.amax(-1, keepdim=True) - least) / 15
    quants = ((blocks - least) * _inverse(d) + 0.5).to(torch.uint8).clamp_max(15)
    return Packed("q4_1", shape, _nibbles(quants), d[..., 0].half(), least[..., 0].half())


def _pack_nf4(blocks: torch.Tensor, shape: tuple[int, int]) -> Packed:
    largest = blocks.abs().amax(-1)
    offset = largest.mean()
    scales = (largest - offset).flatten()
    grouped = torch.nn.functional.pad(scales, (0, -len(scales) % GROUP)).view(-1, GROUP)
    groups = grouped.abs().amax(-1)
    codes = _nearest(grouped * _inverse(groups[:, None]), dynamic_map(blocks.device)).flatten()
    packed = Packed("nf4", shape, blocks, codes[: len(scales)].view_as(largest), None, groups, offset)
    rounded = _scales(packed, slice(None))[..., None]  # so the quants make up for their rounding
    quants = _nearest(blocks * _inverse(rounded), torch.tensor(NF4, device=blocks.device))
    return packed._replace(quants=_nibbles(quants))


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The number of the nearest of ascending levels, uint8."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _scales(packed: Packed, rows: slice) -> torch.Tensor:
    """First-level scales (rows, blocks) in their value, not their code."""
    if packed.groups is None or packed.offset is None:
        return packed.scales[rows]
    blocks = packed.scales.shape[1]
    numbers = torch.arange(packed.scales.numel(), device=packed.scales.device).view(-1, blocks)[rows] // GROUP
    return (
        packed.groups[numbers] * dynamic_map(packed.scales.device)[packed.scales[rows].int()] + packed.offset
    )


def dynamic_map(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 256 values of the signed dynamic 8-bit map, ascending.

    Seven decades; each is divided twice as finely as the decade below.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float64)
        means = (10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
        values += [*means, *(-mean for mean in means)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _nibbles(quants: torch.Tensor) -> torch.Tensor:
    """(out, blocks, size) in 0..15 to (out, blocks · size / 2) bytes; first halves are low bits."""
    low, high = quants.chunk(2, -1)
    return (low | high << 4).flatten(1)
