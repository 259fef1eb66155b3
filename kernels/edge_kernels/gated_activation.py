"""The product in the middle of a gated MLP: SwiGLU and GeGLU.

    y = act(gate) · up
    dgate = dy · up · act'(gate),   dup = dy · act(gate)

    silu        act(u) = u · σ(u)
    gelu        act(u) = u · Φ(u), Φ the normal distribution
    gelu_tanh   the same, with Φ approximated by tanh

Kept for backward: gate and up; act(gate) is recomputed.
Source: Shazeer 2020, arXiv 2002.05202; Hendrycks & Gimpel 2016, arXiv 1606.08415 (the two forms of
    GELU).
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch.nn import functional

from edge_kernels.backend import DTYPES, Launch, blank, jit, on_triton, tl, triton

Kind = Literal["silu", "gelu", "gelu_tanh"]
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's names for the two forms


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Multiply the activated gate with up; the result is shaped and typed like gate.

    Args:
        gate: (..., n) float32, float16 or bfloat16.
        up: of gate's shape, device and dtype. Two halves of one tensor need no copy: their rows
            are read in place.
        kind: the activation, "silu", "gelu" or "gelu_tanh".

    Raises:
        ValueError: gate and up differ in shape, dtype or device, or kind is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}, but has to be one of {', '.join(get_args(Kind))}")
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(
            f"gate is {tuple(gate.shape)} {gate.dtype} on {gate.device} but up {tuple(up.shape)} {up.dtype} "
            f"on {up.device}: they have to be alike"
        )
    if gate.dim() == 0 or not gate.is_floating_point():
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)}, but needs at least one axis and a float dtype"
        )
    y: torch.Tensor = _GatedActivation.apply(gate, up, kind)
    return y


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return (_forward_triton if on_triton(gate) else _forward_torch)(gate, up, kind)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        backend = _backward_triton if on_triton(gate) else _backward_torch
        return *backend(dy, gate, up, ctx.kind), None


# --- torch


def _forward_torch(gate, up, kind):  # type: ignore[no-untyped-def]
    return _activated(gate, kind).mul_(up)


def _backward_torch(dy, gate, up, kind):  # type: ignore[no-untyped-def]
    dgate = dy * up
    if kind == "silu":
        torch.ops.aten.silu_backward(dgate, gate, grad_input=dgate)
    else:
        torch.ops.aten.gelu_backward(dgate, gate, approximate=GELU[kind], grad_input=dgate)
    return dgate, _activated(gate, kind).mul_(dy)


def _activated(gate, kind):  # type: ignore[no-untyped-def]
    return functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate=GELU[kind])


# --- triton: each program has a piece of a row

TILE: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4}


def _forward_triton(gate, up, kind):  # type: ignore[no-untyped-def]
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _rows(gate), _rows(up)
    _forward_kernel[_grid(y)](gate, up, y, y.shape[-1], gate.stride(-2), up.stride(-2), KIND=kind, **TILE)
    return y


def _backward_triton(dy, gate, up, kind):  # type: ignore[no-untyped-def]
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    gate, up, dy = _rows(gate), _rows(up), dy.contiguous()
    _backward_kernel[_grid(dy)](
        dy, gate, up, dgate, dup, dy.shape[-1], gate.stride(-2), up.stride(-2), KIND=kind, **TILE
    )
    return dgate, dup


def _rows(x):  # type: ignore[no-untyped-def]
    """x as rows at one distance from each other; a copy if x does not lie like that in memory."""
    x = x[None] if x.dim() == 1 else x
    even = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))
    return x if x.stride(-1) == 1 and even else x.contiguous()


def _grid(y):  # type: ignore[no-untyped-def]
    n = y.shape[-1]
    return y.numel() // n, triton.cdiv(n, TILE["BLOCK"])


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, y_ptr, n, gate_row, up_row, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + columns, gate * _share(gate, KIND) * up, mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, gate_row, up_row, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    dy = tl.load(dy_ptr + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    share = _share(gate, KIND)
    if KIND == "silu":
        slope = share * (1 - share)
    elif KIND == "gelu":
        slope = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # the normal density
    else:
        slope = 2 * share * (1 - share) * (0.7978845608028654 * (1 + 0.134145 * gate * gate))
    tl.store(dgate_ptr + row * n + columns, dy * up * (share + gate * slope), mask=inside)
    tl.store(dup_ptr + row * n + columns, dy * gate * share, mask=inside)


@jit
def _share(gate, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(gate) / gate, from 0 to 1."""
    if KIND == "silu":
        share = tl.sigmoid(gate)
    elif KIND == "gelu":
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    else:  # (1 + tanh(u)) / 2 = σ(2u)
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return share


def ahead_of_time() -> Iterator[Launch]:
    """Every kind of activation, forward and backward."""
    for (name, dtype), kind in product(DTYPES.items(), get_args(Kind)):
        x, label = blank(dtype, 17, 1024), f"gated_activation {name} {kind}"
        yield Launch(f"{label} forward", _forward_triton, (x, x, kind))
        yield Launch(f"{label} backward", _backward_triton, (x, x, x, kind))
