"""How far a model's predictions of tokens have moved, without ever holding its logits.

    KL(softmax(b Wᵀ) ‖ softmax(h Wᵀ)), mean over rows
    gradient to h: (softmax(h Wᵀ) - softmax(b Wᵀ)) W / rows

The first sweep over the vocabulary computes both normalisers and the divergence, the second the
gradient. Both run in forward, so that only one tensor of h's shape is kept for backward.
"""

import torch

from edge_runtime.trainer.vocabulary import LanguageHead, pieces, rows_within


def divergence(
    before: torch.Tensor, hidden: torch.Tensor, head: LanguageHead, chunk_bytes: int
) -> torch.Tensor:
    """The mean KL of predictions from earlier ones.

    Args:
        before: the earlier states (rows, hidden), without a gradient.
        hidden: the present states, of the same shape and type.
        chunk_bytes: float32 logits of both that exist at once.

    Returns:
        A scalar; 0 for no rows.
    """
    mean: torch.Tensor = _Divergence.apply(before, hidden, head, chunk_bytes)
    return mean


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before, hidden, head, chunk_bytes):  # type: ignore[no-untyped-def]
        rows = len(hidden)
        step = rows_within(chunk_bytes, 2 * rows)
        old_sum, new_sum = (torch.full((rows,), -torch.inf, device=hidden.device) for _ in range(2))
        # Σ exp(old) (old - new), in units of exp(old_sum)
        moved = torch.zeros(rows, device=hidden.device)
        for _, _, old, new in pieces(head, step, before, hidden):
            total = torch.logaddexp(old_sum, old.logsumexp(1))
            moved = moved * (old_sum - total).exp() + ((old - total[:, None]).exp() * (old - new)).sum(1)
            old_sum, new_sum = total, torch.logaddexp(new_sum, new.logsumexp(1))
        dh = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if dh is not None:
            for _, matrix, old, new in pieces(head, step, before, hidden):
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
