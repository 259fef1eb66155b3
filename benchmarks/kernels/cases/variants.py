"""Parts of cases: a run forward and backward, drawn operands, rivals that may be missing."""

from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from edge_kernels import quant
from edge_kernels.quant import Packed

from benchmarks.kernels.cases.case import DTYPE, RANK, SIZE, Variant, Variants


def forward_backward(
    forward: Callable[..., Any],
    leaves: list[torch.Tensor],
    grads: list[Any],
    held: Iterable[torch.Tensor | Packed] = (),
) -> Variant:
    """forward(*leaves) and its backward pass; returns the results and the leaves' gradients."""

    def run() -> list[torch.Tensor]:
        try:
            y = forward(*leaves)
            results = (y,) if isinstance(y, torch.Tensor) else y
            torch.autograd.backward(results, grads)
            return [
                *(result.detach() for result in results),
                *(leaf.grad for leaf in leaves if leaf.grad is not None),
            ]
        finally:
            for leaf in leaves:
                leaf.grad = None

    return Variant(run, sum(part.nbytes for part in held))


def overwriting(
    forward: Callable[..., Any],
    leaves: list[torch.Tensor],
    grads: list[torch.Tensor],
    held: Iterable[torch.Tensor | Packed] = (),
) -> Variant:
    """As forward_backward, for a rival that overwrites its arguments: fresh ones before each run."""
    pairs = [(part, part.detach().clone().requires_grad_(part.requires_grad)) for part in (*leaves, *grads)]

    @torch.no_grad()
    def renew() -> None:
        for original, own in pairs:
            own.copy_(original)

    own = [own for _, own in pairs]
    return forward_backward(forward, own[: len(leaves)], own[len(leaves) :], held)._replace(before=renew)


def compiled(
    device: torch.device, variant: Callable[[Any], Variant], form: Any, name: str = "torch"
) -> Variants:
    """The compiled form on a GPU; on a CPU the compiler's memory would dominate the figure."""
    return {f"{name}, compiled": variant(torch.compile(form, dynamic=False))} if device.type == "cuda" else {}


def draw(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def draw_leaf(device: torch.device, *shape: int) -> torch.Tensor:
    return draw(device, *shape).requires_grad_()


def draw_factors(device: torch.device, out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in float32, whose product matters beside the frozen one, but does not drown it."""
    A, B = (torch.randn(RANK, into, device=device) / into**0.5, torch.randn(out, RANK, device=device) / 8)
    return A.requires_grad_(), B.requires_grad_()


def positions(device: torch.device, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, tokens, width)."""
    slower = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = (torch.arange(tokens, device=device)[:, None] * slower).repeat(1, 2)[None]
    return angles.cos().to(DTYPE), angles.sin().to(DTYPE)


@lru_cache(maxsize=1)  # packing takes longer than a case, and cases of one matrix follow each other
def draw_weight(out: int, into: int, kind: str, device: torch.device) -> torch.Tensor | Packed:
    weight = draw(device, out, into) / into**0.5
    return quant.pack(weight, kind) if kind in quant.BLOCK else weight  # type: ignore[arg-type]


def weight_bytes(out: int, into: int, kind: str) -> int:
    if kind == "dense":
        return SIZE * out * into
    size = quant.BLOCK[kind]
    blocks = out * -(-into // size)
    scales = {
        "q8_0": 2 * blocks,
        "q4_0": 2 * blocks,
        "q4_1": 4 * blocks,
        "nf4": blocks + 4 * -(-blocks // 256) + 4,
    }
    return blocks * size // (1 if kind == "q8_0" else 2) + scales[kind]


@cache
def installed(name: str) -> Any:
    """A rival's module, or None where it cannot be imported."""
    try:
        return import_module(name)
    except ImportError:
        return None


def liger_functions(device: torch.device) -> Any:
    """Liger's functions, which are Triton's."""
    return installed("liger_kernel.transformers.functional") if device.type == "cuda" else None
