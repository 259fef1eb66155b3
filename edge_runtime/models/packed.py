"""A base model whose matrices stay packed: its linear layers, its embedding and its head (kernels: quant).

The layers' matrices are expanded a tile or a matrix at a time while they are used; of the embedding only the rows that a
batch asks for.
"""

from collections.abc import Iterable

import torch
from edge_kernels import Packed, expand, pack, packed_linear
from torch import nn

EMBEDDING = "q8_0"  # of embedding and head: a row of theirs is a token, and four bits are too few for rare ones
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


def pack_pieces(pieces: Iterable[torch.Tensor], format: str) -> Packed:
    """Pack a matrix that comes some rows at a time, so that it is never whole in float32. Not for nf4, whose rows are
    not independent of one another."""
    parts = [pack(piece, format) for piece in pieces]  # type: ignore[arg-type]
    mins = [part.mins for part in parts if part.mins is not None]
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    quants, scales = (torch.cat([part[index] for part in parts]) for index in (2, 3))
    return Packed(parts[0].format, shape, quants, scales, torch.cat(mins) if mins else None)


def pack_matrix(matrix: torch.Tensor, format: str) -> Packed:
    """Pack a matrix of any float type."""
    if format == "nf4":
        return pack(matrix, "nf4")
    return pack_pieces(matrix.split(max(PIECE_VALUES // matrix.shape[1], 1)), format)
