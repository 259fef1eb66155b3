"""Logits over the whole vocabulary, computed a piece at a time so that they never exist at once."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from edge_kernels import Packed, expand
from edge_kernels.quant import GROUP
from transformers import PreTrainedModel

CHUNK_BYTES = 16 << 20  # of float32 logits, or of the expanded weight if that is larger


class LanguageHead(NamedTuple):
    """The last layer of a language model."""

    weight: torch.Tensor | Packed  # (vocabulary, hidden)
    softcap: float | None  # bound of the logits: softcap * tanh(logits / softcap); None: no bound


class TokenScores(NamedTuple):
    """Figures of the logits at each position, (tokens,) each."""

    log_sum: torch.Tensor  # log of the sum of their exponentials
    best: torch.Tensor  # the highest logit
    likely: torch.Tensor  # the token that has it
    target: torch.Tensor  # the logit of the target token


def language_head(model: PreTrainedModel) -> LanguageHead:
    """The head of a loaded model."""
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return LanguageHead(model.get_output_embeddings().weight, softcap)


def pieces(head: LanguageHead, rows: int, *states: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Go once through the vocabulary.

    Args:
        rows: tokens of the vocabulary in a piece.
        states: hidden states, (tokens, hidden) each.

    Yields:
        The piece's first token, its weight (rows, hidden), and the float32 logits (tokens, rows)
        of each of the states.
    """
    weight, softcap = head
    for first in range(0, weight.shape[0], rows):
        piece = slice(first, min(first + rows, weight.shape[0]))
        matrix = expand(weight.rows(piece), states[0].dtype) if isinstance(weight, Packed) else weight[piece]
        yield first, matrix, *(_logits(state, matrix, softcap) for state in states)


def _logits(state: torch.Tensor, matrix: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = (state @ matrix.T).float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def rows_within(chunk_bytes: int, values_a_row: int) -> int:
    """Rows of the vocabulary whose float32 values fit chunk_bytes, in groups of a packed weight."""
    return max(chunk_bytes // (4 * max(values_a_row, 1)) // GROUP, 1) * GROUP


@torch.no_grad()
def sweep(hidden: torch.Tensor, head: LanguageHead, targets: torch.Tensor | None = None) -> TokenScores:
    """Score (tokens, hidden) against the vocabulary.

    Args:
        targets: target tokens (tokens,); None: token 0 at each position.
    """
    log_sum, target, best = (torch.full((len(hidden),), -torch.inf, device=hidden.device) for _ in range(3))
    likely = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    targets = likely if targets is None else targets
    for first, _, logits in pieces(head, rows_within(CHUNK_BYTES, max(hidden.shape)), hidden):
        torch.logaddexp(log_sum, logits.logsumexp(-1), out=log_sum)
        highest, place = logits.max(-1)
        likely = torch.where(highest > best, place + first, likely)
        best = torch.maximum(best, highest)
        inside = (targets >= first) & (targets < first + logits.shape[1])
        column = (targets - first).clamp(0, logits.shape[1] - 1)[:, None]
        target = torch.where(inside, logits.gather(1, column)[:, 0], target)
    return TokenScores(log_sum, best, likely, target)
