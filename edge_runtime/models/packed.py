"""Modules and conversions of a base model whose matrices stay packed (formats: edge_kernels.quant).

A linear layer expands its matrix a tile or a matrix at a time while it computes; the embedding
expands only the rows of a batch.
"""

from collections.abc import Iterable

import torch
from edge_kernels import Packed, expand, pack, packed_linear
from torch import nn

# of embedding and head: each row is a token, and 4 bits are too few for rare tokens
EMBEDDING = "q8_0"
PIECE_VALUES = 1 << 20  # packed at once


class PackedLinear(nn.Module):
    """A frozen linear layer; its weight is Packed, which has a shape and a device like a tensor."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return packed_linear(x, self.weight, self.bias)


class PackedEmbedding(nn.Module):
    """A frozen embedding, whose rows are multiplied by a factor."""

    def __init__(self, weight: Packed, dtype: torch.dtype, factor: float) -> None:
        super().__init__()
        self.weight, self.dtype, self.factor = weight, dtype, factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., hidden)."""
        rows = expand(self.weight.rows(ids.reshape(-1)), self.dtype).view(*ids.shape, -1)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor, dtype=self.dtype)


def pack_matrix(matrix: torch.Tensor, format: str) -> Packed:
    """Pack a matrix of any float type."""
    if format == "nf4":
        return pack(matrix, "nf4")
    return pack_pieces(matrix.split(max(PIECE_VALUES // matrix.shape[1], 1)), format, len(matrix))


def pack_pieces(pieces: Iterable[torch.Tensor], format: str, rows: int) -> Packed:
    """Pack a matrix that comes a few rows at a time and is never whole in float32.

    Not for nf4, which quantises the scales of all rows together.
    """
    return join_pieces((pack(piece, format) for piece in pieces), rows)  # type: ignore[arg-type]


def join_pieces(pieces: Iterable[Packed], rows: int) -> Packed:
    """One packed matrix of pieces with `rows` rows in all; one piece is held at a time."""
    matrix, filled = None, 0
    for piece in pieces:
        if matrix is None:
            empty = (None if part is None else part.new_empty(rows, *part.shape[1:]) for part in piece.parts)
            matrix = Packed(piece.format, (rows, piece.shape[1]), *empty)
        for target, source in zip(matrix.parts, piece.parts, strict=True):
            if target is not None and source is not None:
                target[filled : filled + len(source)] = source
        filled += piece.shape[0]
    assert matrix is not None and filled == rows, f"{filled} of {rows} rows"
    return matrix


def join_rows(pieces: Iterable[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One tensor of pieces that hold its values in order; only one piece is held at a time."""
    tensor, filled = torch.empty(shape, dtype=dtype), 0
    for piece in pieces:
        tensor.view(-1)[filled : filled + piece.numel()] = piece.view(-1)
        filled += piece.numel()
    return tensor
