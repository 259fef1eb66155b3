"""The last layer of a language model: a frozen matrix over the vocabulary, and what follows it.

logits = cap(h Wᵀ + b),   cap(u) = softcap · tanh(u / softcap), or u without a softcap
"""

from math import isfinite
from typing import NamedTuple

import torch

from edge_kernels.quant import Packed
from edge_kernels.tiles import check_packed


class LanguageHead(NamedTuple):
    """The head over a vocabulary."""

    weight: torch.Tensor | Packed  # (vocabulary, n), dense or packed
    bias: torch.Tensor | None = None  # (vocabulary,) dense, of the hidden states' dtype (Phi)
    softcap: float | None = None  # bound of the logits (Gemma 2)

    def product(
        self, x: torch.Tensor, piece: slice, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x Wᵀ + b over a piece of the vocabulary, (tokens, rows); weight: the piece's dense rows of W."""
        if self.bias is None:
            return torch.mm(x, weight.T, out=out)
        return torch.addmm(self.bias[piece], x, weight.T, out=out)


def check_head(head: LanguageHead, hidden: torch.Tensor) -> None:
    """Check that a head fits hidden states (..., n).

    Raises:
        ValueError: a shape or dtype does not fit, or softcap is not a usable number.
    """
    weight, bias, softcap = head
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has rows of {hidden.shape[-1]} but head reads {weight.shape[1]}")
    if isinstance(weight, Packed):
        check_packed("head", weight)
    elif weight.dtype != hidden.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but head is {weight.dtype}: they need one dtype")
    if bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], hidden.dtype):
        raise ValueError(
            f"bias is {tuple(bias.shape)} of {bias.dtype} but has to be ({weight.shape[0]},) of {hidden.dtype}"
        )
    if softcap is not None and not (isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap} but has to be above 0, or None")
