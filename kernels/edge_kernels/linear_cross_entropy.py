"""Mean cross-entropy of a linear head, without the logits of the whole batch.

    loss = mean over kept tokens of  logsumexp(l) - l[label],   l = cap(h Wᵀ),   cap(u) = softcap · tanh(u / softcap) or u

Tokens whose label is ignored are left out before the product. The rest go in chunks whose logits fit a byte budget; the
gradient of h is made chunk by chunk in the forward pass, so that backward only scales it. Kept: dh.
Source: Wijmans et al. 2024, arXiv 2411.09009 (why), Hsu et al. 2024, arXiv 2410.10989 (gradient in the forward pass).
"""

import torch

IGNORED = -100


def linear_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    chunk_bytes: int = 32 << 20,
) -> torch.Tensor:
    """The loss, a float32 scalar; 0 when every label is ignored.

    Args:
        hidden: (..., n) last hidden states, already shifted against the labels.
        head: (vocabulary, n) frozen, of hidden's dtype.
        labels: (...) int64 in 0..vocabulary-1, or IGNORED.
        softcap: bound of the logits (Gemma 2), or None.
        chunk_bytes: float32 logits that may exist at once.

    Raises:
        ValueError: shapes do not fit together, or a label is out of range.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden has tokens {tuple(hidden.shape[:-1])} but labels have {tuple(labels.shape)}")
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(f"hidden has rows of {hidden.shape[-1]} but head reads {head.shape[1]}")
    kept = labels != IGNORED
    targets = labels[kept]
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < head.shape[0]):
        raise ValueError(
            f"labels go from {int(targets.min())} to {int(targets.max())}, the head has {head.shape[0]} rows"
        )
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden[kept], head, targets, softcap, chunk_bytes)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, softcap, chunk_bytes):  # type: ignore[no-untyped-def]
        tokens = len(targets)
        step = max(chunk_bytes // (4 * head.shape[0]), 1)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, tokens, step):
            piece = slice(first, min(first + step, tokens))
            logits = (hidden[piece] @ head.T).float()
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            wanted = targets[piece, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(-1, wanted)).sum()
            if dhidden is not None:
                slope = None if softcap is None else 1 - (logits / softcap).square()
                dlogits = logits.sub_(log_sum).exp_()
                dlogits.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
                if slope is not None:
                    dlogits.mul_(slope)
                dhidden[piece] = dlogits.div_(tokens).to(head.dtype) @ head
                del dlogits
            del logits  # before the next chunk is made
        ctx.save_for_backward(dhidden)
        return loss / max(tokens, 1)

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        (dhidden,) = ctx.saved_tensors
        return dhidden * dloss.to(dhidden.dtype), None, None, None, None
