"""Rotary positions on queries and keys.

    y1 = x1 cos1 - x2 sin1,   y2 = x2 cos2 + x1 sin2       x1, x2: the two halves of a head's rotated part
    dx1 = dy1 cos1 + dy2 sin2,   dx2 = dy2 cos2 - dy1 sin1

Each result is made in one buffer of its own; no rotated half or product beside it. Kept for backward: cos and sin, which
all layers share.
Source: Su et al. 2021, arXiv 2104.09864, in the form by halves that transformers' models have.
"""

import torch

from edge_kernels.backend import Launch, jit, on_triton, tl, triton


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys to their positions.

    Args:
        q: (batch, heads, tokens, width) float32, float16 or bfloat16.
        k: (batch, key heads, tokens, width) of q's dtype.
        cos, sin: (batch or 1, tokens, n) without gradient; n is even and at most width. The first n of a head are turned,
            the rest passes.

    Returns:
        Tensors shaped, laid out and typed like q and k.

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
        raise ValueError(f"sin is {tuple(sin.shape)} but cos {tuple(cos.shape)}: they have to be alike")
    q_turned: torch.Tensor = _Rotary.apply(q, cos, sin)
    k_turned: torch.Tensor = _Rotary.apply(k, cos, sin)
    return q_turned, k_turned


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, False)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, True), None, None


def _turn(x, cos, sin, back):  # type: ignore[no-untyped-def]
    return (_turn_triton if on_triton(x) and x.numel() else _turn_torch)(x, cos, sin, back)


# --- torch


def _turn_torch(x, cos, sin, back):  # type: ignore[no-untyped-def]
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


# --- triton: all heads of a token a program


def _turn_triton(x, cos, sin, back):  # type: ignore[no-untyped-def]
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    batch, heads, tokens, width = x.shape
    n = cos.shape[-1]
    strides = (*x.stride()[:3], *y.stride()[:3], 0 if len(cos) == 1 else tokens * n)
    _turn_kernel[(batch, tokens)](
        x, cos, sin, y, heads, *strides, WIDTH=width, HALF=n // 2, BACK=back, **_tile(heads, width)
    )
    return y


def _tile(heads: int, width: int) -> dict[str, int]:
    """HEADS at a time, by the padded COLUMNS of half of what is turned and of what passes."""
    columns = triton.next_power_of_2(width)
    return {
        "HEADS": min(triton.next_power_of_2(heads), max(4096 // columns, 1)),
        "COLUMNS": columns,
        "num_warps": 4,
    }


@jit
def _turn_kernel(  # type: ignore[no-untyped-def]
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
    # each value of the result from the one at its place and its partner in the other half
    first = column < HALF
    turned = column < 2 * HALF
    partner = tl.where(first, column + HALF, column - HALF)
    at = cos_ptr + batch * cos_batch + token * (2 * HALF)
    cos = tl.load(at + column, mask=turned, other=1.0).to(tl.float32)[None, :]
    at = sin_ptr + batch * cos_batch + token * (2 * HALF)
    sin = tl.load(at + (partner if BACK else column), mask=turned, other=0.0).to(tl.float32)
    sin = tl.where(first != BACK, -sin, sin)[None, :]
    for begin in range(0, heads, HEADS):
        head = begin + tl.arange(0, HEADS)
        inside = (head[:, None] < heads) & (column[None, :] < WIDTH)
        row = x_ptr + batch * x_batch + head[:, None] * x_head + token * x_token
        x = tl.load(row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        other = tl.load(row + partner[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
        where = y_ptr + batch * y_batch + head[:, None] * y_head + token * y_token + column[None, :]
        tl.store(where, x * cos + other * sin, mask=inside)


def ahead_of_time(capability: int) -> list[Launch]:
    """The common widths, and one of which a part is turned; the same on every architecture."""
    launches = []
    strides = ("x_batch", "x_head", "x_token", "y_batch", "y_head", "y_token", "cos_batch")
    for name in ("bf16", "fp16", "fp32"):
        for heads, width, half in ((9, 64, 32), (32, 128, 64), (4, 256, 128), (32, 80, 16)):
            for back in (False, True):
                tile = _tile(heads, width)
                warps = tile.pop("num_warps")
                signature = {f"{part}_ptr": f"*{name}" for part in ("x", "cos", "sin", "y")}
                signature |= {"heads": "i32", **dict.fromkeys(strides, "i32")}
                constants = {"WIDTH": width, "HALF": half, "BACK": back, **tile}
                label = f"rotary {name} {heads} heads of {width} {'backward' if back else 'forward'}"
                launches.append(Launch(label, _turn_kernel, signature, constants, warps, divisible=strides))
    return launches
