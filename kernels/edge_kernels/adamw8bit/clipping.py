"""Clips a gradient by the norm of all factors before that norm is known.

A factor steps inside backward, when the gradients of earlier layers do not exist yet. So the
squared norm is estimated from the part that backward has passed: in the factor's last step that
part was a known share of the whole. The last step's norm steadies the estimate:

    norm² = (passed + DAMPING · last norm²) / (share + DAMPING)

Before a factor's first step every factor counts alike, unless a backward has measured the shares.
"""

import torch

DAMPING = 0.1  # weight of the last step's squared norm in the estimate


class Clipping:
    """The norms of the last step and of this one; they stay on the device, so nothing waits."""

    def __init__(self, factors: int, clip_norm: float | None, device: torch.device) -> None:
        self._clip_norm = clip_norm
        self._one = torch.ones((), device=device)
        self._squares = torch.zeros(2, device=device)  # squared norm of the last step; of this one so far
        self._passed = torch.zeros(factors, device=device)  # the latter, at each factor's turn
        self._shares = torch.zeros(factors, device=device)  # of the whole, at each factor's last turn

    def factor(self, grads: dict[int, torch.Tensor], turns: float) -> torch.Tensor:
        """The number () to multiply with the gradients that have their turn together.

        Args:
            grads: by the index of their factor.
            turns: share of the factors that had their turn in this step, these included.
        """
        if self._clip_norm is None:
            return self._one
        last, now = self._squares.unbind()
        *_, index = grads
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads.values()]
        now += torch.stack(norms).square().sum()
        self._passed[list(grads)] = now
        share = self._shares[index]
        total = torch.where(share > 0, (now + DAMPING * last) / (share + DAMPING), now / turns)
        return self._clip_norm / torch.maximum(total, now).sqrt().clamp_min(self._clip_norm)

    def end_step(self) -> None:
        """Make the norm of this step the last one, and each factor's share known."""
        if self._clip_norm is None:
            return
        last, now = self._squares.unbind()
        torch.where(self._passed > 0, self._passed / now, self._shares, out=self._shares)
        torch.where(now > 0, now, last, out=last)
        now.zero_()
        self._passed.zero_()
