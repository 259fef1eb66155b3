"""Activations in 8 bits a value, with one float32 scale a row.

scale = max |x| / 127 over the row,   quants = round(x / scale),   x ≈ quants · scale
"""

import torch

from edge_kernels.backend import row_pieces
from edge_kernels.quant import PIECE_VALUES


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to int8.

    Args:
        x: (..., n) of any float dtype.

    Returns:
        quants (..., n) int8 and scale (..., 1) float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    quants = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(rows), 1, device=x.device)
    for piece in row_pieces(rows.shape, PIECE_VALUES):
        scale[piece] = rows[piece].abs().amax(-1, keepdim=True).float() / 127
        quants[piece] = (rows[piece] / scale[piece].clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return quants.view(x.shape), scale.view(*x.shape[:-1], 1)


def expand_rows(quants: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """quants · scale in a float dtype: the inverse of quantise_rows, up to the rounding."""
    x = torch.empty(quants.shape, dtype=dtype, device=quants.device)
    rows, scales = quants.reshape(-1, quants.shape[-1]), scale.reshape(-1, 1)
    for piece in row_pieces(rows.shape, PIECE_VALUES):
        x.view(rows.shape)[piece] = rows[piece] * scales[piece]
    return x
