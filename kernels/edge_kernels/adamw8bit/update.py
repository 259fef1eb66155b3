"""One step of AdamW on moments in 8 bits a value.

A byte of m and a byte of v are 8-bit floats with 3 bits of mantissa, as a share of the largest of
their block, which has one float32 scale for each:

    m = ±(2^(e - 15) (1 + f / 8) - 2^-15) · scale      4 bits of e
    v =  (2^(e - 31) (1 + f / 8) - 2^-31) · scale      5 bits of e

So the relative precision is the same over three decades of m and four of sqrt(v), where a dynamic
map is coarse below the first two. A v above zero never becomes zero, which would make its update
explode.

m is rounded to the nearest. v is rounded at random, right on average: a step moves v by a
thousandth, far less than 8 bits resolve, and rounding to the nearest would freeze it when gradients
shrink. The random number is a function of factor, step and place, so the same run gives the same
bits.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from edge_kernels.backend import DTYPES, Launch, blank, jit, tl

BLOCK = 256  # values that share a scale
PIECE = 1 << 17  # values that the torch backend holds in float32 at a time
LEAST1, LEAST2 = 2.0**-15, 2.0**-31  # subtracted from the 8-bit floats of m and v
BITS1, BITS2 = 127 - 15 << 23, 127 - 31 << 23  # these two numbers as bits of a float32
TINY = torch.finfo(torch.float32).tiny
CUT = 20  # bits of a float32's mantissa that the 8-bit floats lack
SPREAD = 0x9E3779B1  # the golden ratio in 32 bits


class Step(NamedTuple):
    """The numbers of one step, in the order in which the kernel takes them."""

    decay: float  # 1 - lr · weight decay
    rest1: float  # 1 - β1
    rest2: float  # 1 - β2
    rate: float  # lr with the bias correction of m
    root: float  # bias correction of sqrt(v)
    eps: float
    seed: int  # 31 bits


# --- torch: in pieces that stay in the cache


def update_torch(
    values: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
    rows: torch.Tensor,
    clip: torch.Tensor,
    step: Step,
) -> None:
    """Step several factors as if they were one, in place.

    Args:
        values: flat tensors, one a factor.
        grads: as values.
        state: codes of m int8 and of v uint8 (blocks, BLOCK), their scales (blocks,), of all
            factors.
        rows: (n,) the factors' blocks in the state.
        clip: () factor of the gradients.
        step: the numbers of the step.
    """
    flat, grad_flat = (
        torch.cat([_padded(part) for part in parts]).view(-1, BLOCK) for parts in (values, grads)
    )
    for start in range(0, len(rows), PIECE // BLOCK):
        piece = slice(start, start + PIECE // BLOCK)
        p, grad, blocks = flat[piece], grad_flat[piece].float() * clip, rows[piece]
        codes1, codes2, scale1, scale2 = (part[blocks] for part in state)
        m = _expand(codes1.int().abs_(), BITS1, LEAST1).mul_(codes1.sign_()).mul_(scale1[:, None])
        v = _expand(codes2.int(), BITS2, LEAST2).mul_(scale2[:, None])
        m.lerp_(grad, step.rest1)
        v.lerp_(grad.square_(), step.rest2)
        change = m / v.sqrt().mul_(step.root).add_(step.eps)
        p.copy_((p.float() * step.decay).sub_(change, alpha=step.rate))
        for part, updated in zip(state, _codes(m, v, start * BLOCK, step.seed), strict=True):
            part[blocks] = updated.to(part.dtype)
    sizes = [math.ceil(len(value) / BLOCK) for value in values]
    for value, updated in zip(values, flat.split(sizes), strict=True):
        value.copy_(updated.view(-1)[: len(value)])


def _codes(m, v, first_place, seed):  # type: ignore[no-untyped-def]
    """Round moments (blocks, BLOCK), in place, to codes and scales, as the state has them."""
    scale1, scale2 = (moment.abs().amax(1) for moment in (m, v))
    sign, x = m.sign(), m.abs_().div_(scale1[:, None].clamp_min(TINY))
    codes1 = _round(x, 1 << CUT - 1, BITS1, LEAST1) * sign
    x = v.div_(scale2[:, None].clamp_min(TINY))
    dice = torch.arange(first_place, first_place + x.numel(), dtype=torch.int32, device=x.device)
    dice = dice.mul_(SPREAD - (1 << 32)).add_(seed)
    dice = dice.bitwise_right_shift_(32 - CUT).bitwise_and_((1 << CUT) - 1)
    codes2 = torch.maximum(_round(x, dice.view(x.shape), BITS2, LEAST2), x > 0)
    return codes1, codes2, scale1, scale2


def _padded(flat):  # type: ignore[no-untyped-def]
    missing = -len(flat) % BLOCK
    return torch.nn.functional.pad(flat, (0, missing)) if missing else flat


def _expand(code, bits, least):  # type: ignore[no-untyped-def]
    """Codes int32, in place, to their share of the scale, float32."""
    return code.bitwise_left_shift_(CUT).add_(bits).view(torch.float32).sub_(least)


def _round(x, dice, bits, least):  # type: ignore[no-untyped-def]
    """x in 0..1 to a code: dice, of CUT bits, is added to the bits that are cut off."""
    return (x + least).view(torch.int32).sub_(bits).add_(dice).bitwise_right_shift_(CUT)


# --- triton: one pass; a warp has a block

WARPS = 4
CONSTANTS = {
    **{"ROWS": WARPS, "BLOCK": BLOCK, "SPREAD": SPREAD, "CUT": CUT, "TINY": TINY},
    **{"BITS1": BITS1, "BITS2": BITS2, "LEAST1": LEAST1, "LEAST2": LEAST2},
}


def update_triton(p, g, state, clip, step):  # type: ignore[no-untyped-def]
    """Step one factor in place; p and g are flat, state is that of the factor's own blocks."""
    grid = (math.ceil(len(state[0]) / WARPS),)
    _update_kernel[grid](*(p, g, *state, clip, p.numel(), *step), **CONSTANTS, num_warps=WARPS)


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
    rate,
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
    valid, inside = rows * BLOCK < n, places < n
    padded = valid[:, None]  # the state is padded to blocks
    g = tl.load(g_ptr + places, mask=inside, other=0.0).to(tl.float32) * tl.load(clip_ptr)
    p = tl.load(p_ptr + places, mask=inside, other=0.0).to(tl.float32)
    code1 = tl.load(first_ptr + places, mask=padded, other=0).to(tl.int32)
    code2 = tl.load(second_ptr + places, mask=padded, other=0).to(tl.int32)
    scale1 = tl.load(scale1_ptr + rows, mask=valid, other=0.0)[:, None]
    scale2 = tl.load(scale2_ptr + rows, mask=valid, other=0.0)[:, None]

    m = (((tl.abs(code1) << CUT) + BITS1).to(tl.float32, bitcast=True) - LEAST1) * scale1
    m = tl.where(code1 < 0, -m, m)
    v = (((code2 << CUT) + BITS2).to(tl.float32, bitcast=True) - LEAST2) * scale2
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    p = p * decay - rate * m / (tl.sqrt(v) * root + eps)
    tl.store(p_ptr + places, p, mask=inside)

    scale1 = tl.max(tl.abs(m), axis=1)
    tl.store(scale1_ptr + rows, scale1, mask=valid)
    x = tl.abs(m) / tl.maximum(scale1, TINY)[:, None]
    code1 = ((x + LEAST1).to(tl.int32, bitcast=True) - BITS1 + (1 << (CUT - 1))) >> CUT
    tl.store(first_ptr + places, tl.where(m < 0, -code1, code1).to(tl.int8), mask=padded)

    scale2 = tl.max(v, axis=1)
    tl.store(scale2_ptr + rows, scale2, mask=valid)
    x = v / tl.maximum(scale2, TINY)[:, None]
    dice = ((places.to(tl.uint32) * SPREAD + seed.to(tl.uint32)) >> (32 - CUT)).to(tl.int32)
    code2 = ((x + LEAST2).to(tl.int32, bitcast=True) - BITS2 + dice) >> CUT
    tl.store(second_ptr + places, tl.where(x > 0, tl.maximum(code2, 1), 0).to(tl.uint8), mask=padded)


def ahead_of_time() -> Iterator[Launch]:
    """Every pair of dtypes of a factor and its gradient, which is float32 after accumulating."""
    state = [
        *(blank(dtype, 16, BLOCK) for dtype in (torch.int8, torch.uint8)),
        *(blank(torch.float32, 16) for _ in range(2)),
    ]
    pairs = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"))
    for p, g in pairs:
        factor, grad = (blank(DTYPES[name], 16 * BLOCK) for name in (p, g))
        arguments = (factor, grad, state, blank(torch.float32), Step(1.0, 0.1, 0.001, 1e-3, 1.0, 1e-8, 3))
        yield Launch(f"adamw8bit {p} factor, {g} gradient", update_triton, arguments)
