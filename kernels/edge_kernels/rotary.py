"""Rotary positions on queries and keys.

    y1 = x1 cos1 - x2 sin1,      y2 = x2 cos2 + x1 sin2
    dx1 = dy1 cos1 + dy2 sin2,   dx2 = dy2 cos2 - dy1 sin1

x1 and x2 are the two halves of the rotated part of a head. The result is written in place into its
own buffer, so no rotated half and no product exists beside it.
Kept for backward: cos and sin, which all layers share.
Source: Su et al. 2021, arXiv 2104.09864, in the form by halves that transformers uses.
"""

from collections.abc import Iterator
from itertools import product

import torch

from edge_kernels.backend import DTYPES, Launch, blank, jit, on_triton, tl, triton


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys to their positions.

    Args:
        q: (batch, heads, tokens, width) float32, float16 or bfloat16.
        k: (batch, key heads, tokens, width) of q's dtype.
        cos: (batch or 1, tokens, n) without gradient; n is even and at most width. The first n
            values of a head are rotated, the others pass unchanged.
        sin: shaped like cos.

    Returns:
        The rotated q and k, with the shapes, memory layouts and dtypes of q and k.

    Raises:
        ValueError: shapes do not fit together.
    """
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}, but has to be floats (batch, heads, tokens, width)"
            )
        n = cos.shape[-1] if cos.dim() else 0
        if n % 2 or not 0 < n <= x.shape[-1]:
            raise ValueError(
                f"cos has rows of {n}, but an even number up to {name}'s width {x.shape[-1]} is needed"
            )
        if cos.shape not in ((x.shape[0], x.shape[2], n), (1, x.shape[2], n)):
            raise ValueError(
                f"cos is {tuple(cos.shape)} but {name} {tuple(x.shape)} needs {(x.shape[0], x.shape[2], n)}"
            )
    if sin.shape != cos.shape:
        raise ValueError(
            f"sin is {tuple(sin.shape)} but cos {tuple(cos.shape)}: their shapes have to be equal"
        )
    q_rotated: torch.Tensor = _Rotary.apply(q, cos, sin)
    k_rotated: torch.Tensor = _Rotary.apply(k, cos, sin)
    return q_rotated, k_rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return (_rotate_triton if on_triton(x) else _rotate_torch)(x, cos, sin, False)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return (_rotate_triton if on_triton(dy) else _rotate_torch)(dy, cos, sin, True), None, None


# --- torch


def _rotate_torch(x, cos, sin, back):  # type: ignore[no-untyped-def]
    half = cos.shape[-1] // 2
    y = torch.empty_like(x)
    y[..., 2 * half :] = x[..., 2 * half :]
    (x1, x2), (y1, y2) = (part[..., : 2 * half].chunk(2, -1) for part in (x, y))
    (cos1, cos2), (sin1, sin2) = (part[:, None].to(x.dtype).chunk(2, -1) for part in (cos, sin))
    if back:
        sin1, sin2 = -sin2, -sin1
    torch.mul(x1, cos1, out=y1).addcmul_(x2, sin1, value=-1)
    torch.mul(x2, cos2, out=y2).addcmul_(x1, sin2)
    return y


# --- triton: each program has all heads of a token


def _rotate_triton(x, cos, sin, back):  # type: ignore[no-untyped-def]
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    (batch, heads, tokens, width), n = x.shape, cos.shape[-1]
    strides = (*x.stride()[:3], *y.stride()[:3], 0 if len(cos) == 1 else tokens * n)
    columns = triton.next_power_of_2(width)
    heads_at_once = min(triton.next_power_of_2(heads), max(4096 // columns, 1))
    tile = {"HEADS": heads_at_once, "COLUMNS": columns, "num_warps": 4}
    _rotate_kernel[(batch, tokens)](
        x, cos, sin, y, heads, *strides, WIDTH=width, HALF=n // 2, BACK=back, **tile
    )
    return y


@jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    heads,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    cos_batch,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch, token = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    # a value of the result depends on the value at its place and on the partner in the other half
    first = column < HALF
    rotated = column < 2 * HALF
    partner = tl.where(first, column + HALF, column - HALF)
    at = cos_ptr + batch * cos_batch + token * (2 * HALF)
    cos = tl.load(at + column, mask=rotated, other=1.0).to(tl.float32)[None, :]
    at = sin_ptr + batch * cos_batch + token * (2 * HALF)
    sin = tl.load(at + (partner if BACK else column), mask=rotated, other=0.0).to(tl.float32)
    sin = tl.where(first != BACK, -sin, sin)[None, :]
    for begin in range(0, heads, HEADS):
        head = begin + tl.arange(0, HEADS)
        inside = (head[:, None] < heads) & (column[None, :] < WIDTH)
        row = x_ptr + batch * x_batch + head[:, None] * x_head + token * x_token
        x = tl.load(row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        paired = tl.load(row + partner[None, :], mask=inside & rotated[None, :], other=0.0).to(tl.float32)
        where = y_ptr + batch * y_batch + head[:, None] * y_head + token * y_token + column[None, :]
        tl.store(where, x * cos + paired * sin, mask=inside)


def ahead_of_time() -> Iterator[Launch]:
    """Common widths of heads, and a width of which only a part is rotated."""
    for (name, dtype), (heads, width, n) in product(
        DTYPES.items(), ((9, 64, 64), (32, 128, 128), (4, 256, 256), (32, 80, 32))
    ):
        x, cos = blank(dtype, 2, heads, 16, width), blank(dtype, 1, 16, n)
        label = f"rotary {name} {heads} heads of {width}"
        yield Launch(f"{label} forward", _rotate_triton, (x, cos, cos, False))
        yield Launch(f"{label} backward", _rotate_triton, (x, cos, cos, True))
