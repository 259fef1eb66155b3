"""A block that keeps nothing for backward but its input, and runs again there.

    forward    y = block(x), without a graph             kept: x, or x in 8 bits a value and one scale a row
    backward   y = block(x̃), with a graph;  dx, dp = dyᵀ ∂y/∂(x̃, p)

x̃ is what was kept: x itself, or x rounded, with an error of at most 1/254 of the row's largest value. The forward values
are exact either way; with "int8" the gradient is that at x̃. The second run has the random numbers and the autocast of the
first; a random state is kept only if the first run drew from it.
Source: Chen et al. 2016, arXiv 1604.06174.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from edge_kernels.quant import expand_rows, quantise_rows

Output: TypeAlias = torch.Tensor | tuple[Any, ...]


def checkpoint_block(
    block: Callable[..., Output],
    hidden: torch.Tensor,
    *args: Any,
    keep: Literal["input", "int8"] = "input",
    **kwargs: Any,
) -> Output:
    """Run a block; its inner activations exist only while it runs, forward and again in backward.

    Parameters used inside get their gradients while backward runs the block, hooks on them fire there. It takes
    `loss.backward()`: torch.autograd.grad does not see them, and there is no second derivative. A parameter used in
    several such blocks gets its gradient in several parts. A block that changes a cache of keys would do so twice.

    Args:
        block: a module or function of (hidden, *args, **kwargs); gives a tensor, or a tuple that starts with one.
        hidden: (..., n) of any float type.
        args, kwargs: without gradient: masks, positions. They are kept as they are.
        keep: "input" keeps hidden, which costs nothing where something else holds it; "int8" 1 byte a value.

    Raises:
        ValueError: keep is neither, hidden is of no float type, an argument besides hidden wants a gradient, or the block
            gives neither tensor nor tuple.
    """
    if keep not in ("input", "int8"):
        raise ValueError(f'keep is {keep!r}, but has to be "input" or "int8"')
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, but has to be of a float type")
    trains = any(p.requires_grad for p in block.parameters()) if isinstance(block, torch.nn.Module) else True
    if not torch.is_grad_enabled() or not (trains or hidden.requires_grad):
        return block(hidden, *args, **kwargs)
    for name, value in [*((f"args[{i}]", value) for i, value in enumerate(args)), *kwargs.items()]:
        if _wants_gradient(value):
            raise ValueError(f"{name} wants a gradient, but only hidden and the block's parameters get one: detach it")
    # makes the output part of the graph where hidden is not, as after a frozen embedding
    anchor = None if hidden.requires_grad else torch.empty(0, device=hidden.device, requires_grad=True)
    output: Output = _CheckpointBlock.apply(hidden, anchor, partial(_call, block, args, kwargs), keep)
    return output


def _wants_gradient(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    inner: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    )
    return any(map(_wants_gradient, inner))


def _call(block: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> Output:
    output = block(hidden, *args, **kwargs)
    if not isinstance(output, torch.Tensor | tuple):
        raise ValueError(
            f"block gives {type(output).__name__}, but has to give a tensor or a tuple that starts with one"
        )
    return output


class _CheckpointBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, anchor, call, keep):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.call, ctx.dtype = call, hidden.dtype
        ctx.autocast = _autocast(hidden.device.type)
        kept = (hidden,) if keep == "input" else quantise_rows(hidden)
        before = _random_states(hidden.device)
        with torch.autocast(**ctx.autocast):
            output = call(hidden)
        drew = any(not torch.equal(*states) for states in zip(before, _random_states(hidden.device), strict=True))
        ctx.random = before if drew else None
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        kept = ctx.saved_tensors
        hidden = kept[0].detach() if len(kept) == 1 else expand_rows(kept[0], kept[1], ctx.dtype)
        hidden.requires_grad_(ctx.needs_input_grad[0])
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(**ctx.autocast))
            if ctx.random is not None:
                stack.enter_context(torch.random.fork_rng([hidden.device] if hidden.is_cuda else []))
                _set_random_states(hidden.device, ctx.random)
            output = ctx.call(hidden)
        outputs = (output,) if isinstance(output, torch.Tensor) else output
        pairs = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if dy is not None and y.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        return hidden.grad, None, None, None


def _autocast(device: str) -> dict[str, Any]:
    """The present state, without the cache: older torch keeps the first run's casts, which have no graph, for the second."""
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
        "cache_enabled": False,
    }


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
