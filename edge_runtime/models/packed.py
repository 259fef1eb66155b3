"""A base model whose matrices stay packed: its linear layers, its embedding and its head (kernels: quant).

The layers' matrices are expanded a tile or a matrix at a time while they are used; of the embedding only the rows that a
batch asks for.
"""

from collections.abc import Iterable

import torch
from edge_kernels import Packed, expand, pack, packed_linear
from torch import nn

EMBEDDING = (
    "q8_0"  # of embedding and head: a row of theirs is a token, and four bits are too few for rare ones
)
PIECE_VALUES = 1 << 20  # packed at once


class PackedLinear(nn.Module):
    """A frozen linear layer (..., in) to (..., out). weight is Packed, and has a shape and a device as a tensor has."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return packed_linear(x, self.weight, self.bias)


class PackedEmbedding(nn.Module):
    """Ids to rows, times a factor (Gemma's square root of the width)."""

    def __init__(self, weight: Packed, dtype: torch.dtype, factor: float) -> None:
        super().__init__()
        self.weight, self.dtype, self.factor = weight, dtype, factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., hidden)."""
        rows = expand(self.weight.rows(ids.reshape(-1)), self.dtype).view(*ids.shape, -1)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor, dtype=self.dtype)


def pack_pieces(pieces: Iterable[torch.Tensor], format: str, rows: int) -> Packed:
    """Pack a matrix of so many rows that comes some at a time, so that it is never whole in float32, nor twice packed. Not for
    nf4, whose rows are not independent of one another."""
    return join_pieces((pack(piece, format) for piece in pieces), rows)  # type: ignore[arg-type]


def join_pieces(pieces: Iterable[Packed], rows: int) -> Packed:
    """A matrix of so many rows of pieces that are packed, each of which may go before the next one comes."""
    whole, filled = None, 0
    for part in pieces:
        if whole is None:
            held = (None if one is None else one.new_empty(rows, *one.shape[1:]) for one in part.parts)
            whole = Packed(part.format, (rows, part.shape[1]), *held)
        for all_, some in zip(whole.parts, part.parts, strict=True):
            if all_ is not None and some is not None:
                all_[filled : filled + len(some)] = some
        filled += part.shape[0]
    assert whole is not None and filled == rows, f"{filled} of {rows} rows"
    return whole


def pack_matrix(matrix: torch.Tensor, format: str) -> Packed:
    """Pack a matrix of any float type."""
    if format == "nf4":
        return pack(matrix, "nf4")
    return pack_pieces(matrix.split(max(PIECE_VALUES // matrix.shape[1], 1)), format, len(matrix))
