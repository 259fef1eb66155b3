"""AdamW on low-rank factors that steps inside backward, so no gradient outlives its layer.

    g' = g · min(1, clip / norm)
    m  = m + (1 - β1) (g' - m)          v = v + (1 - β2) (g'² - v)
    p  = p (1 - lr · decay) - lr · (m / (1 - β1ᵗ)) / (sqrt(v / (1 - β2ᵗ)) + eps)

Kept: one flat buffer over all factors, with one byte of m and one of v a value (see `update`) and
two float32 scales a block of 256 values. Every factor starts a new block. Source: Loshchilov &
Hutter 2019, arXiv 1711.05101; Dettmers et al. 2022, arXiv 2110.02861 (moments in blocks); Lv et al.
2024, arXiv 2306.09782 (steps inside backward).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch

from edge_kernels.adamw8bit import update
from edge_kernels.adamw8bit.update import BLOCK, Step, ahead_of_time, update_torch, update_triton
from edge_kernels.backend import DTYPES, on_triton

__all__ = ["AdamW8bit", "ahead_of_time"]

BETAS, EPS = (0.9, 0.999), 1e-8
DAMPING = 0.1  # weight of the last step's squared norm in the estimate that clipping makes


class AdamW8bit:
    """Steps each factor as soon as backward has its gradient.

    After `loss.backward()` every factor that backward reached has made its step, and its grad is
    None. A factor that backward does not reach is left alone; each factor has its own count of
    steps for the bias correction. A step ends when backward reaches a factor again, or with
    `step()`.

    This is no torch.optim.Optimizer, because constructing one imports torch's compiler, over 100
    MiB. The learning rate is the attribute `lr`, one number for all factors; set it before
    backward.

    Args:
        parameters: float32, float16 or bfloat16, contiguous, on one device. Use float32: one step
            is far below the resolution of bfloat16.
        lr: learning rate.
        weight_decay: of the parameters themselves, not through the moments.
        clip_norm: largest norm of a step's gradient over all factors, or None (see `Clipping`).

    Raises:
        ValueError: a parameter or a number is not as described.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        _check(self.parameters, lr, weight_decay, clip_norm)
        self.lr, self.weight_decay = lr, weight_decay
        device = self.parameters[0].device
        blocks = [math.ceil(p.numel() / BLOCK) for p in self.parameters]
        *self._starts, _ = accumulate(blocks, initial=0)  # each factor's first block
        self._rows = torch.arange(sum(blocks), device=device).split(blocks)  # each factor's blocks
        self._first = torch.zeros(sum(blocks), BLOCK, dtype=torch.int8, device=device)
        self._second = torch.zeros(sum(blocks), BLOCK, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(2, sum(blocks), device=device)
        self.steps = [0] * len(blocks)  # that each factor has made
        self._stepped: set[int] = set()  # factors that had their turn in this step
        self._waiting: dict[int, torch.Tensor] = {}  # gradients of factors that will step together
        self._sums: torch.Tensor | None = None  # of micro-batches' gradients, as the moments lie
        self._summed: set[int] = set()  # factors with a gradient in the sums
        self._accumulating = self._measuring = False
        self._clipping = Clipping(len(blocks), clip_norm, device)
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._take, index))
            for index, p in enumerate(self.parameters)
        ]

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside, backward adds its gradients up and steps nothing.

        For all micro-batches of a step but the last: the next backward outside, or `step()`, steps
        with the sum. The sum is float32 in one flat buffer, 4 bytes a value from the first use on.
        A factor that the last backward does not reach keeps its sum for the next step, unless
        `step()` follows.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, backward steps nothing; it measures norms for the next clipping."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
            self._end_step()

    @torch.no_grad()
    def step(self) -> None:
        """End the step: apply sums that no backward has applied, and record the step's norm."""
        for index in sorted(self._summed):
            self._update(index, self._sum(index))
        self._apply()
        self._end_step()

    def forget(self) -> None:
        """Drop the sums of `accumulating`, for a step that is given up."""
        for index in self._summed:
            self._sum(index).zero_()
        self._summed.clear()
        self._waiting.clear()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    # --- a step, in the order of calls

    @torch.no_grad()
    def _take(self, index: int, parameter: torch.Tensor) -> None:
        """The hook: backward has the complete gradient of this factor."""
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        if self._measuring:
            self._stepped.add(index)
            self._clipping.factor({index: grad}, len(self._stepped) / len(self.parameters))
            return
        if self._accumulating or index in self._summed:
            grad = self._sum(index).add_(grad.reshape(-1))
            self._summed.add(index)
        if not self._accumulating:
            # at the end of this backward
            torch.autograd.Variable._execution_engine.queue_callback(self._apply)
            self._update(index, grad)

    def _update(self, index: int, grad: torch.Tensor) -> None:
        """Let a factor have its turn.

        In torch it waits until others fill a piece with it: on a small factor the calls cost more
        than the arithmetic.
        """
        if index in self._stepped:
            self._apply()
            self._end_step()
        if sum(waiting.numel() for waiting in self._waiting.values()) + grad.numel() > update.PIECE:
            self._apply()
        self._stepped.add(index)
        self.steps[index] += 1
        self._waiting[index] = grad.reshape(-1)
        if on_triton(grad):
            self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        """Step the waiting factors; those with the same count of steps and dtype go together."""
        if not self._waiting:
            return
        # independent of the order in which backward reached the factors of a layer
        self._waiting = dict(sorted(self._waiting.items()))
        groups: dict[tuple[int, torch.dtype], list[int]] = {}
        for index in self._waiting:
            groups.setdefault((self.steps[index], self.parameters[index].dtype), []).append(index)
        clip = self._clipping.factor(self._waiting, len(self._stepped) / len(self.parameters))
        for (count, _), group in groups.items():
            values = [self.parameters[index].view(-1) for index in group]
            grads = [self._waiting[index] for index in group]
            rows = torch.cat([self._rows[index] for index in group])
            step = self._step_numbers(group[0], count)
            state = self._first, self._second, *self._scales
            if on_triton(rows):  # where a group is one factor
                blocks = slice(self._starts[group[0]], self._starts[group[0]] + len(rows))
                update_triton(values[0], grads[0], [part[blocks] for part in state], clip, step)
            else:
                update_torch(values, grads, state, rows, clip, step)
        for index in self._summed & self._waiting.keys():
            self._sum(index).zero_()
        self._summed -= self._waiting.keys()
        self._waiting.clear()

    def _step_numbers(self, index: int, count: int) -> Step:
        beta1, beta2 = BETAS
        rate, root = self.lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        decay = 1 - self.lr * self.weight_decay
        # 31 bits for a factor and step; odd and not 1, so that Triton compiles one kernel for all
        mixed = (index * 0x7FEB352D + count) * 0x9E3779B1 & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * 0x846CA68B & 0xFFFFFFFF
        return Step(decay, 1 - beta1, 1 - beta2, rate, root, EPS, seed=mixed >> 1 | 3)

    def _end_step(self) -> None:
        if self._stepped:
            self._clipping.end_step()
        self._stepped.clear()

    def _sum(self, index: int) -> torch.Tensor:
        """The factor's part of the flat buffer of summed gradients."""
        if self._sums is None:
            self._sums = torch.zeros(self._scales.shape[1], BLOCK, device=self._scales.device)
        return self._sums[self._starts[index] :].view(-1)[: self.parameters[index].numel()]


def _check(
    parameters: list[torch.nn.Parameter], lr: float, weight_decay: float, clip_norm: float | None
) -> None:
    if not parameters:
        raise ValueError("parameters has none, but at least one is needed")
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("parameters has one twice, but each has to be there once")
    for number, p in enumerate(parameters):
        usable = p.numel() and p.requires_grad and p.is_contiguous() and p.is_leaf
        if p.dtype not in DTYPES.values() or not usable:
            raise ValueError(
                f"parameters[{number}] is {p.dtype} {tuple(p.shape)}, strides {p.stride()}, "
                f"requires_grad={p.requires_grad}, but has to be a contiguous leaf in float32, float16 or "
                "bfloat16 that requires a gradient and is not empty"
            )
    if len({p.device for p in parameters}) > 1:
        devices = sorted({str(p.device) for p in parameters})
        raise ValueError(f"parameters are on {devices}, but need to share one device")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but has to be finite and not negative")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm is {clip_norm}, but has to be finite and positive, or None")


class Clipping:
    """Clips a gradient by the norm of all factors before that norm is known.

    A factor steps inside backward, when the gradients of earlier layers do not exist yet. So the
    squared norm is estimated from the part that backward has passed: in the factor's last step that
    part was a known share of the whole. The last step's norm steadies the estimate:

        norm² = (passed + DAMPING · last norm²) / (share + DAMPING)

    Before a factor's first step every factor counts alike, unless a backward has measured the
    shares. The norms stay on the device, so nothing waits.
    """

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
