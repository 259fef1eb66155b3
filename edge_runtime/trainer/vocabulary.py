"""Figures of a language model's logits, computed over a piece of the vocabulary at a time.

The logits never exist at once. `sweep` scores tokens. `Divergence` is how far predictions moved:

    KL(softmax(l(before)) ‖ softmax(l(h))), mean over rows;   l(h) = h Wᵀ + b
    gradient to h: (softmax(l(h)) - softmax(l(before))) W / rows
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from edge_kernels import LanguageHead, Packed, expand
from edge_kernels.quant import GROUP
from transformers import PreTrainedModel

CHUNK_BYTES = 16 << 20  # of float32 logits, or of the expanded weight if that is larger


class TokenScores(NamedTuple):
    """Figures of the logits at each position, (tokens,) each."""

    log_sum: torch.Tensor  # log of the sum of their exponentials
    best: torch.Tensor  # the highest logit
    likely: torch.Tensor  # the token that has it
    target: torch.Tensor  # the logit of the target token


def language_head(model: PreTrainedModel) -> LanguageHead:
    """The head of a loaded model."""
    layer = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return LanguageHead(layer.weight, layer.bias, softcap)


@torch.no_grad()
def sweep(hidden: torch.Tensor, head: LanguageHead, targets: torch.Tensor | None = None) -> TokenScores:
    """Score (tokens, hidden) against the vocabulary.

    Args:
        targets: target tokens (tokens,); None: token 0 at each position.
    """
    log_sum, target, best = (torch.full((len(hidden),), -torch.inf, device=hidden.device) for _ in range(3))
    likely = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    targets = likely if targets is None else targets
    for first, _, logits in _pieces(head, CHUNK_BYTES // (4 * max(hidden.shape)), hidden):
        torch.logaddexp(log_sum, logits.logsumexp(-1), out=log_sum)
        highest, place = logits.max(-1)
        likely = torch.where(highest > best, place + first, likely)
        best = torch.maximum(best, highest)
        inside = (targets >= first) & (targets < first + logits.shape[1])
        column = (targets - first).clamp(0, logits.shape[1] - 1)[:, None]
        target = torch.where(inside, logits.gather(1, column)[:, 0], target)
    return TokenScores(log_sum, best, likely, target)


class Divergence(torch.autograd.Function):
    """The mean KL of predictions from earlier ones, a scalar; 0 for no rows.

    apply takes the earlier states (rows, hidden) without a gradient, the present states of the same
    shape and type, the LanguageHead, and the bytes of float32 logits of both that may exist at
    once. Both sweeps run in forward, so that only one tensor of h's shape is kept for backward.
    """

    @staticmethod
    def forward(ctx, before, hidden, head, chunk_bytes):  # type: ignore[no-untyped-def]
        rows = len(hidden)
        piece = chunk_bytes // (8 * max(rows, 1))
        old_sum, new_sum = (torch.full((rows,), -torch.inf, device=hidden.device) for _ in range(2))
        # Σ exp(old) (old - new), in units of exp(old_sum)
        moved = torch.zeros(rows, device=hidden.device)
        for _, _, old, new in _pieces(head, piece, before, hidden):
            total = torch.logaddexp(old_sum, old.logsumexp(1))
            moved = moved * (old_sum - total).exp() + ((old - total[:, None]).exp() * (old - new)).sum(1)
            old_sum, new_sum = total, torch.logaddexp(new_sum, new.logsumexp(1))
        dh = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if dh is not None:
            for _, matrix, old, new in _pieces(head, piece, before, hidden):
                change = (new - new_sum[:, None]).exp() - (old - old_sum[:, None]).exp()
                if head.softcap is not None:
                    change *= 1 - (new / head.softcap) ** 2  # slope of the bounded logits
                dh += change.to(matrix.dtype) @ matrix
            dh = (dh / max(rows, 1)).to(hidden.dtype)
        ctx.save_for_backward(dh)
        return (moved - old_sum + new_sum).sum() / max(rows, 1)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (dh,) = ctx.saved_tensors
        return None, dh * dy, None, None


def _pieces(head: LanguageHead, rows: int, *states: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Go once through the vocabulary, about this many rows of the weight at a time.

    Yields:
        The piece's first token, its weight (rows, hidden), and the float32 logits (tokens, rows)
        of each of the states (tokens, hidden).
    """
    weight, _, softcap = head
    # packed weights come in groups of rows
    rows = max(rows // GROUP, 1) * GROUP
    for first in range(0, weight.shape[0], rows):
        piece = slice(first, min(first + rows, weight.shape[0]))
        matrix = expand(weight.rows(piece), states[0].dtype) if isinstance(weight, Packed) else weight[piece]
        logits = [head.product(state, piece, matrix).float() for state in states]
        for values in logits if softcap is not None else ():
            values.div_(softcap).tanh_().mul_(softcap)
        yield first, matrix, *logits
