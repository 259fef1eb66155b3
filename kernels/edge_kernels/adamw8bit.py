"""AdamW on low-rank factors that steps inside backward: 8-bit moments, and no gradient that outlives its layer.

    g' = g · min(1, clip / norm)
    m  = m + (1 - β1) (g' - m)          v = v + (1 - β2) (g'² - v)
    p  = p (1 - lr · decay) - lr · (m / (1 - β1ᵗ)) / (sqrt(v / (1 - β2ᵗ)) + eps)

Kept: one flat buffer over all factors, small ones too; every factor starts a new block of 256. A value has one byte of m
and one of v, both 8-bit floats with 3 bits of mantissa: m = ±(2^(e - 15) (1 + f / 8) - 2^-15) of its block's largest, with 4
bits of e, and v likewise with 5 bits and 31. So the relative precision is the same over three decades of m and four of
sqrt(v), where a dynamic map's is coarse below the first two, and a v that is not zero never becomes it, which would make
its update explode. A block has a float32 scale for each.

m is rounded to the nearest. v is rounded at random, right on average: a step moves it by a thousandth of itself, far less
than 8 bits resolve, and to the nearest it would stay where it is when gradients shrink. The random number is a function of
step and place, so a resumed run is the same to the bit.
Source: Loshchilov & Hutter 2019, arXiv 1711.05101; Dettmers et al. 2022, arXiv 2110.02861 (block-wise moments); Lv et al.
2024, arXiv 2306.09782 (step inside backward).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from edge_kernels.backend import Launch, jit, on_triton, tl

BLOCK = 256  # values that share a scale
PIECE = 1 << 17  # values that the torch backend has in float32 at once
DAMPING = (
    0.1  # how much of the last step's norm goes into the estimate of the present one, as a share of the whole
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST1, LEAST2 = 2.0**-15, 2.0**-31  # what the 8-bit floats of m and v start from,
BITS1, BITS2 = 127 - 15 << 23, 127 - 31 << 23  # as float32 has it in bits
TINY = torch.finfo(torch.float32).tiny
CUT = 20  # bits of float32's mantissa that they lack
SPREAD = 0x9E3779B1  # golden ratio of 32 bits


class AdamW8bit:
    """Steps each factor when its gradient is complete; after `loss.backward()` every step is made and every grad is None.

    Not a torch.optim.Optimizer: to construct one imports torch's compiler, over 100 MiB of memory. The learning rate is
    `lr`, one number for all factors; set it before backward.

    A factor that a backward does not reach is left alone, and each has its own count of steps for the bias correction.

    Clipping has to do without this step's norm, which is not known before the last layer. It is estimated from the part
    of it that backward has passed: in a factor's last step that was a known share of the whole. The last step's norm
    steadies the estimate. Before the first step `measuring` makes both known; without it every factor counts alike there.
    A step is over when backward reaches a factor again, or with `step()`.

    Args:
        parameters: float32, float16 or bfloat16, contiguous, on one device. Use float32: a step is far below what bfloat16
            resolves.
        clip_norm: largest norm of a step's whole gradient, or None.

    Raises:
        ValueError: a parameter or a number is not as described.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        _check(self.parameters, lr, betas, eps, weight_decay, clip_norm)
        self.lr, self.betas, self.eps, self.weight_decay, self.clip_norm = (
            lr,
            betas,
            eps,
            weight_decay,
            clip_norm,
        )
        device = self.parameters[0].device
        blocks = [math.ceil(p.numel() / BLOCK) for p in self.parameters]
        *self._starts, _ = accumulate(blocks, initial=0)
        self._first = torch.zeros(sum(blocks), BLOCK, dtype=torch.int8, device=device)
        self._second = torch.zeros(sum(blocks), BLOCK, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(2, sum(blocks), device=device)
        self._rows = torch.arange(sum(blocks), device=device).split(blocks)  # each factor's blocks
        self._one = torch.ones((), device=device)
        self._steps = [0] * len(blocks)
        self._stepped: set[int] = set()  # factors that had their turn in this step
        self._waiting: dict[int, torch.Tensor] = {}  # gradients of factors that will step together
        self._squares = torch.zeros(2, device=device)  # of the last step's norm, and of this one's so far
        self._so_far = torch.zeros(len(blocks), device=device)  # the latter, when each factor had its turn
        self._shares = torch.zeros(
            len(blocks), device=device
        )  # what it then was of the whole, in each factor's last step
        self._sums: torch.Tensor | None = None
        self._summed: set[int] = set()  # factors with a gradient in the sums
        self._accumulating = self._measuring = False
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._take, i))
            for i, p in enumerate(self.parameters)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""
        norms = (self._squares, self._so_far, self._shares)
        kept = (self._first, self._second, self._scales, *norms, self._sums)
        return sum(part.nbytes for part in kept if part is not None)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backwards in here add up and step nothing; the next one outside, or `step()`, steps with the sum.

        For all micro-batches of a step but the last. The sum is float32 in a flat buffer, 4 bytes a value from the first
        use on. A factor that the last backward does not reach keeps its sum for the next, unless `step()` follows.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A backward in here steps nothing and keeps no gradient: it finds out the norms for the clipping of the next."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
            self._end_step()

    @torch.no_grad()
    def step(self) -> None:
        """End the step: apply sums that no backward has applied, and take the norm in. Not needed otherwise."""
        for index in sorted(self._summed):
            self._update(index, self._sum(index))
        self._apply()
        self._end_step()

    def forget(self) -> None:
        """Drop what `accumulating` has summed up, for a step that is given up."""
        for index in self._summed:
            self._sum(index).zero_()
        self._summed.clear()
        self._waiting.clear()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to continue as if it had not stopped, next to the constructor's arguments; no copies. lr is in."""
        return {
            "sizes": [p.numel() for p in self.parameters],
            "lr": self.lr,
            "steps": list(self._steps),
            "stepped": sorted(self._stepped),
            "first": self._first,
            "second": self._second,
            "scales": self._scales,
            "squares": self._squares,
            "so_far": self._so_far,
            "shares": self._shares,
            "sums": self._sums,
            "summed": sorted(self._summed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict gave.

        Raises:
            ValueError: it is of other parameters.
        """
        sizes = [p.numel() for p in self.parameters]
        if state["sizes"] != sizes:
            raise ValueError(f"state is of parameters with {state['sizes']} values, but these have {sizes}")
        self.lr, self._steps = state["lr"], list(state["steps"])
        self._stepped, self._summed = set(state["stepped"]), set(state["summed"])
        for ours, theirs in (
            (self._first, state["first"]),
            (self._second, state["second"]),
            (self._scales, state["scales"]),
            (self._squares, state["squares"]),
            (self._so_far, state["so_far"]),
            (self._shares, state["shares"]),
        ):
            ours.copy_(theirs)
        self._sums = None if state["sums"] is None else state["sums"].to(self._first.device, copy=True)

    # --- the course of a step

    @torch.no_grad()
    def _take(self, index: int, parameter: torch.Tensor) -> None:
        """The hook: backward has the whole gradient of this factor."""
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        if self._measuring:
            self._stepped.add(index)
            self._clip({index: grad})
            return
        if self._accumulating or index in self._summed:
            grad = self._sum(index).add_(grad.reshape(-1))
            self._summed.add(index)
        if not self._accumulating:
            torch.autograd.Variable._execution_engine.queue_callback(
                self._apply
            )  # at the end of this backward
            self._update(index, grad)

    def _update(self, index: int, grad: torch.Tensor) -> None:
        """Step a factor. In torch it waits for others, as many as make a piece: on a small one operations cost more than
        they compute."""
        if index in self._stepped:
            self._apply()
            self._end_step()
        if sum(waiting.numel() for waiting in self._waiting.values()) + grad.numel() > PIECE:
            self._apply()
        self._stepped.add(index)
        self._steps[index] += 1
        self._waiting[index] = grad.reshape(-1)
        if on_triton(grad):
            self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        """Step the factors that wait, those of one count of steps and type together."""
        if not self._waiting:
            return
        self._waiting = dict(sorted(self._waiting.items()))  # however backward came to those of a block
        groups: dict[tuple[int, torch.dtype], list[int]] = {}
        for index in self._waiting:
            groups.setdefault((self._steps[index], self.parameters[index].dtype), []).append(index)
        clip = self._clip(self._waiting)
        for (steps, _), group in groups.items():
            values = [self.parameters[index].view(-1) for index in group]
            grads = [self._waiting[index] for index in group]
            rows = torch.cat([self._rows[index] for index in group])
            numbers, seed = self._numbers(steps), _seed(group[0], steps)
            state = self._first, self._second, *self._scales
            if on_triton(rows):
                part = slice(self._starts[group[0]], self._starts[group[0]] + len(rows))
                _update_triton(values[0], grads[0], [one[part] for one in state], clip, numbers, seed)
            else:
                _update_torch(values, grads, state, rows, clip, numbers, seed)
        for index in self._summed & self._waiting.keys():
            self._sum(index).zero_()
        self._summed -= self._waiting.keys()
        self._waiting.clear()

    def _numbers(self, step: int) -> tuple[float, ...]:
        """Decay, 1 - β1, 1 - β2, lr and 1 / sqrt of v with their bias corrections, eps."""
        beta1, beta2 = self.betas
        size, root = self.lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
        return 1 - self.lr * self.weight_decay, 1 - beta1, 1 - beta2, size, root, self.eps

    def _clip(self, grads: dict[int, torch.Tensor]) -> torch.Tensor:
        """What to multiply gradients with that have their turn together. It stays on the device, where nobody has to wait
        for it."""
        if self.clip_norm is None:
            return self._one
        last, now = self._squares.unbind()
        *_, index = grads
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads.values()]
        now += torch.stack(norms).square().sum()
        self._so_far[list(grads)] = now
        known, share = self._shares[index], len(self._stepped) / len(self.parameters)
        whole = torch.where(known > 0, (now + DAMPING * last) / (known + DAMPING), now / share)
        return self.clip_norm / torch.maximum(whole, now).sqrt().clamp_min(self.clip_norm)

    def _end_step(self) -> None:
        if self._stepped and self.clip_norm is not None:
            last, now = self._squares.unbind()
            torch.where(self._so_far > 0, self._so_far / now, self._shares, out=self._shares)
            torch.where(now > 0, now, last, out=last)
            now.zero_()
            self._so_far.zero_()
        self._stepped.clear()

    def _sum(self, index: int) -> torch.Tensor:
        """The factor's part of the flat buffer of summed gradients."""
        if self._sums is None:
            self._sums = torch.zeros(self._scales.shape[1], BLOCK, device=self._scales.device)
        return self._sums[self._starts[index] :].view(-1)[: self.parameters[index].numel()]


def _check(
    parameters: list[torch.nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
) -> None:
    if not parameters:
        raise ValueError("parameters has none, but at least one is needed")
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("parameters has one twice, but each has to be there once")
    for number, p in enumerate(parameters):
        if (
            p.dtype not in DTYPES
            or not p.numel()
            or not p.requires_grad
            or not p.is_contiguous()
            or not p.is_leaf
        ):
            raise ValueError(
                f"parameters[{number}] is {p.dtype} {tuple(p.shape)}, strides {p.stride()}, requires_grad={p.requires_grad}, "
                "but has to be a contiguous leaf in float32, float16 or bfloat16 that wants a gradient and is not empty"
            )
    if len({p.device for p in parameters}) > 1:
        raise ValueError(
            f"parameters are on {sorted({str(p.device) for p in parameters})}, but need to share one device"
        )
    clip = 1.0 if clip_norm is None else clip_norm
    for name, value, good, needed in (
        ("lr", lr, 0 <= lr < math.inf, "finite and not negative"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "in 0..1, without 1"),
        ("eps", eps, 0 < eps < math.inf, "finite and positive"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "finite and not negative"),
        ("clip_norm", clip, 0 < clip < math.inf, "finite and positive, or None"),
    ):
        if not good:
            raise ValueError(f"{name} is {value}, but has to be {needed}")


def _seed(index: int, step: int) -> int:
    """31 bits, different for each factor and step. Odd and never 1, so that Triton compiles one kernel for all of them."""
    mixed = (index * 0x7FEB352D + step) * SPREAD & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x846CA68B & 0xFFFFFFFF
    return mixed >> 1 | 3


# --- torch: in pieces that stay in the cache


def _update_torch(values, grads, state, rows, clip, numbers, seed):  # type: ignore[no-untyped-def]
    """Step factors as if they were one. rows: of the state, for each block of theirs."""
    decay, rest1, rest2, size, root, eps = numbers
    flat, grad_flat = (
        torch.cat([_whole_blocks(one) for one in ones]).view(-1, BLOCK) for ones in (values, grads)
    )
    for start in range(0, len(rows), PIECE // BLOCK):
        piece = slice(start, start + PIECE // BLOCK)
        p, grad, at = flat[piece], grad_flat[piece].float() * clip, rows[piece]
        codes1, codes2, scale1, scale2 = (part[at] for part in state)
        m = _expand(codes1.int().abs_(), BITS1, LEAST1).mul_(codes1.sign_()).mul_(scale1[:, None])
        v = _expand(codes2.int(), BITS2, LEAST2).mul_(scale2[:, None])
        m.lerp_(grad, rest1)
        v.lerp_(grad.square_(), rest2)
        change = m / v.sqrt().mul_(root).add_(eps)
        p.copy_((p.float() * decay).sub_(change, alpha=size))

        largest = [one.abs().amax(1) for one in (m, v)]
        sign, x = m.sign(), m.abs_().div_(largest[0][:, None].clamp_min(TINY))
        codes1 = _round(x, 1 << CUT - 1, BITS1, LEAST1) * sign
        x = v.div_(largest[1][:, None].clamp_min(TINY))
        dice = torch.arange(start * BLOCK, start * BLOCK + x.numel(), dtype=torch.int32, device=x.device)
        dice = (
            dice.mul_(SPREAD - (1 << 32))
            .add_(seed)
            .bitwise_right_shift_(32 - CUT)
            .bitwise_and_((1 << CUT) - 1)
        )
        codes2 = torch.maximum(_round(x, dice.view(x.shape), BITS2, LEAST2), x > 0)
        for part, new in zip(state, (codes1, codes2, *largest), strict=True):
            part[at] = new.to(part.dtype)
    sizes = [math.ceil(one.numel() / BLOCK) for one in values]
    for value, new in zip(values, flat.split(sizes), strict=True):
        value.copy_(new.view(-1)[: len(value)])


def _whole_blocks(flat):  # type: ignore[no-untyped-def]
    more = -len(flat) % BLOCK
    return torch.nn.functional.pad(flat, (0, more)) if more else flat


def _expand(code, bits, least):  # type: ignore[no-untyped-def]
    return code.bitwise_left_shift_(CUT).add_(bits).view(torch.float32).sub_(least)


def _round(x, dice, bits, least):  # type: ignore[no-untyped-def]
    """x in 0..1 to a code, up with the probability of what is cut off where dice is random."""
    return (x + least).view(torch.int32).sub_(bits).add_(dice).bitwise_right_shift_(CUT)


# --- triton: one pass, a warp a block


def _update_triton(p, g, state, clip, numbers, seed):  # type: ignore[no-untyped-def]
    grid = (math.ceil(len(state[0]) / WARPS),)
    _update_kernel[grid](*(p, g, *state, clip, p.numel(), *numbers, seed), **CONSTANTS, num_warps=WARPS)


WARPS = 4
CONSTANTS = {
    **{"ROWS": WARPS, "BLOCK": BLOCK, "SPREAD": SPREAD, "CUT": CUT, "TINY": TINY},
    **{"BITS1": BITS1, "BITS2": BITS2, "LEAST1": LEAST1, "LEAST2": LEAST2},
}


@jit
def _update_kernel(  # type: ignore[no-untyped-def]
    p_ptr,
    g_ptr,
    first_ptr,
    second_ptr,
    scale1_ptr,
    scale2_ptr,
    clip_ptr,
    n,
    decay,
    rest1,
    rest2,
    size,
    root,
    eps,
    seed,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPREAD: tl.constexpr,
    CUT: tl.constexpr,
    TINY: tl.constexpr,
    BITS1: tl.constexpr,
    BITS2: tl.constexpr,
    LEAST1: tl.constexpr,
    LEAST2: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    kept, inside = rows * BLOCK < n, places < n
    whole = kept[:, None]  # the state is padded to blocks
    g = tl.load(g_ptr + places, mask=inside, other=0.0).to(tl.float32) * tl.load(clip_ptr)
    p = tl.load(p_ptr + places, mask=inside, other=0.0).to(tl.float32)
    code1 = tl.load(first_ptr + places, mask=whole, other=0).to(tl.int32)
    code2 = tl.load(second_ptr + places, mask=whole, other=0).to(tl.int32)
    scale1 = tl.load(scale1_ptr + rows, mask=kept, other=0.0)[:, None]
    scale2 = tl.load(scale2_ptr + rows, mask=kept, other=0.0)[:, None]

    m = (((tl.abs(code1) << CUT) + BITS1).to(tl.float32, bitcast=True) - LEAST1) * scale1
    m = tl.where(code1 < 0, -m, m)
    v = (((code2 << CUT) + BITS2).to(tl.float32, bitcast=True) - LEAST2) * scale2
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    p = p * decay - size * m / (tl.sqrt(v) * root + eps)
    tl.store(p_ptr + places, p, mask=inside)

    scale1 = tl.max(tl.abs(m), axis=1)
    tl.store(scale1_ptr + rows, scale1, mask=kept)
    x = tl.abs(m) / tl.maximum(scale1, TINY)[:, None]
    code1 = ((x + LEAST1).to(tl.int32, bitcast=True) - BITS1 + (1 << (CUT - 1))) >> CUT
    tl.store(first_ptr + places, tl.where(m < 0, -code1, code1).to(tl.int8), mask=whole)

    scale2 = tl.max(v, axis=1)
    tl.store(scale2_ptr + rows, scale2, mask=kept)
    x = v / tl.maximum(scale2, TINY)[:, None]
    dice = ((places.to(tl.uint32) * SPREAD + seed.to(tl.uint32)) >> (32 - CUT)).to(tl.int32)
    code2 = ((x + LEAST2).to(tl.int32, bitcast=True) - BITS2 + dice) >> CUT
    tl.store(second_ptr + places, tl.where(x > 0, tl.maximum(code2, 1), 0).to(tl.uint8), mask=whole)


def ahead_of_time(capability: int) -> list[Launch]:
    """Every configuration that a launch takes; the same on every architecture."""
    states = {
        "first_ptr": "*i8",
        "second_ptr": "*u8",
        **dict.fromkeys(("scale1_ptr", "scale2_ptr", "clip_ptr"), "*fp32"),
    }
    scalars = {
        "n": "i32",
        **dict.fromkeys(("decay", "rest1", "rest2", "size", "root", "eps"), "fp32"),
        "seed": "i32",
    }
    return [
        Launch(
            f"adamw8bit {p} factor, {g} gradient",
            _update_kernel,
            {"p_ptr": f"*{p}", "g_ptr": f"*{g}", **states, **scalars},
            CONSTANTS,
            num_warps=WARPS,
            divisible=("n",),
        )
        for p, g in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"))
    ]
