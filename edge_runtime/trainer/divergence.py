"""How far a model's predictions of tokens have moved, without ever holding its logits.

    KL(softmax(b Wᵀ) ‖ softmax(h Wᵀ)), mean over rows        gradient to h: (softmax(h Wᵀ) - softmax(b Wᵀ)) W / rows

The vocabulary is gone through twice in pieces: for the two normalisers and the divergence itself, then for the gradient.
"""

import torch
from edge_kernels import Packed, expand
from edge_kernels.quant import GROUP


def divergence(
    before: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor | Packed,
    softcap: float | None,
    chunk_bytes: int,
) -> torch.Tensor:
    """The mean KL of rows (rows, width) from what they were.

    Args:
        before: of hidden's shape and type, without a gradient.
        head: (vocabulary, width). softcap: the bound of its logits, if it has one.
        chunk_bytes: of float32 logits at once, twice.
    """
    found: torch.Tensor = _Divergence.apply(before, hidden, head, softcap, chunk_bytes)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before, hidden, head, softcap, chunk_bytes):  # type: ignore[no-untyped-def]
        rows = len(hidden)
        step = max(chunk_bytes // (8 * max(rows, 1)) // GROUP, 1) * GROUP
        old_sum, new_sum = (torch.full((rows,), -torch.inf, device=hidden.device) for _ in range(2))
        moved = torch.zeros(rows, device=hidden.device)  # Σ exp(old) (old - new), in units of exp(old_sum)
        for _, old, _, new, _ in _pieces(before, hidden, head, softcap, step):
            total = torch.logaddexp(old_sum, old.logsumexp(1))
            moved = moved * (old_sum - total).exp() + ((old - total[:, None]).exp() * (old - new)).sum(1)
            old_sum, new_sum = total, torch.logaddexp(new_sum, new.logsumexp(1))
        dh = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if dh is not None:
            for matrix, old, _, new, slope in _pieces(before, hidden, head, softcap, step):
                apart = (new - new_sum[:, None]).exp() - (old - old_sum[:, None]).exp()
                dh += (apart * slope).to(matrix.dtype) @ matrix
            dh = (dh / max(rows, 1)).to(hidden.dtype)
        ctx.save_for_backward(dh)
        return (moved - old_sum + new_sum).sum() / max(rows, 1)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (dh,) = ctx.saved_tensors
        return None, dh * dy, None, None, None


def _pieces(before, hidden, head, softcap, step):  # type: ignore[no-untyped-def]
    """Some rows of the head, and of both states the logits with their slopes."""
    for first in range(0, head.shape[0], step):
        rows = slice(first, min(first + step, head.shape[0]))
        matrix = expand(head.rows(rows), hidden.dtype) if isinstance(head, Packed) else head[rows]
        yield matrix, *_logits(before, matrix, softcap), *_logits(hidden, matrix, softcap)


def _logits(state, matrix, softcap):  # type: ignore[no-untyped-def]
    logits = (state @ matrix.T).float()
    if softcap is None:
        return logits, 1.0
    bounded = (logits / softcap).tanh()
    return softcap * bounded, 1 - bounded**2
