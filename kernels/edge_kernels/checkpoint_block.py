"""A block that keeps nothing for backward but its input, and runs again there.

    forward    y = block(x), whose graph goes at once; the tensors that it would keep are counted
    backward   block(x̃) again, and backward through its graph

Kept: x, or x in 8 bits a value and one scale a row. x̃ is what was kept: x itself, or x rounded, with an error of at most
1/254 of the row's largest value. The forward values are exact either way; with "int8" the gradient is that at x̃. The second
run has the random numbers and the autocast of the first; a random state is kept only if the first run drew from it. There an
operation whose result nothing reads need not make it: it can ask `nothing_reads`.

The first run's graph must not stay, though its tensors are gone: its hundreds of small objects would lie in a heap among the
block's large pieces, and what one block frees would not fit the next one's.
Source: Chen et al. 2016, arXiv 1604.06174.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks

from edge_kernels.quant import expand_rows, quantise_rows

Output: TypeAlias = torch.Tensor | tuple[Any, ...]
_runs = threading.local()  # innermost: the block that runs in this thread


class Kept:
    """What the blocks of a pass keep, one kind in one piece of memory.

    Each in memory of its own would lie among what its block's operations make and free, and leave holes on both sides that
    the next block's do not fit.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._places: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the next place for its like; a piece goes when the last block has let go of its place."""
        places = self._places.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        if not places:
            piece = tensor.new_empty(self._blocks, *tensor.shape).untyped_storage()
            # not views of one tensor: autograd would take each that is filled for a change of all
            places.extend(
                tensor.new_empty(0).set_(piece, n * tensor.numel(), tensor.shape) for n in range(self._blocks)
            )
        return places.pop().copy_(tensor)


def checkpoint_block(
    block: Callable[..., Output],
    hidden: torch.Tensor,
    *args: Any,
    keep: Literal["input", "int8"] = "input",
    kept: Kept | None = None,
    **kwargs: Any,
) -> Output:
    """Run a block; its inner activations exist only while it runs, forward and again in backward.

    It has to do the same when it runs again: a block that changes a cache of keys does not. The parameters' gradients come to
    their .grad, whichever are asked for, as backward runs inside backward.

    Args:
        block: a module or function of (hidden, *args, **kwargs); gives a tensor, or a tuple of them and anything else.
        hidden: (..., n) of any float type.
        args, kwargs: masks, positions. They are kept as they are, and get no gradients.
        keep: "input" keeps hidden, which costs nothing where something else holds it; "int8" 1 byte a value.
        kept: where a copy of it goes; None keeps it where it is.

    Raises:
        ValueError: keep is neither, hidden is of no float type, or another argument wants a gradient.
        RuntimeError: in backward, when the second run kept another number of tensors than the first.
    """
    if keep not in ("input", "int8"):
        raise ValueError(f'keep is {keep!r}, but has to be "input" or "int8"')
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, but has to be of a float type")
    trains = any(p.requires_grad for p in block.parameters()) if isinstance(block, torch.nn.Module) else True
    if not torch.is_grad_enabled() or not (trains or hidden.requires_grad):
        return block(hidden, *args, **kwargs)
    for name, value in (*enumerate(args, 1), *kwargs.items()):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise ValueError(
                f"argument {name} wants a gradient, but only hidden and what the block itself holds get theirs"
            )
    boundary = (hidden.detach(),) if keep == "input" else quantise_rows(hidden.detach())
    if kept is not None:
        boundary = tuple(map(kept.copy, boundary))
    parameters = torch.empty(0, requires_grad=True)  # in place of the block's own, where hidden wants no gradient
    output: Output = _Block.apply(lambda x: block(x, *args, **kwargs), boundary, parameters, hidden)
    return output


def nothing_reads(*saved: torch.Tensor | None) -> bool:
    """Whether an operation's result may be anything: a block runs again, and after what this one saves nothing more is kept.

    An operation that calls others in its own forward does so in `without_blocks`: what they save is not kept.
    """
    run: _Run | None = getattr(_runs, "innermost", None)
    return run is not None and run.counted + sum(part is not None for part in saved) == run.expected


def without_blocks() -> AbstractContextManager[None]:
    """While inside, no operation takes itself for part of a block that runs."""
    return _innermost(None)


def start(parts: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number from which backward goes on to the parts with these gradients.

    Given them as arguments, torch imports SymPy first: 30 MiB.
    """
    with torch.enable_grad():
        number: torch.Tensor = _Start.apply(grads, *parts)
    return number


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grads, *parts):  # type: ignore[no-untyped-def]
        ctx.grads = grads
        return parts[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        return None, *ctx.grads


class _Run:
    """Counts the tensors that a block's operations keep for backward while it runs."""

    def __init__(self, expected: int | None) -> None:
        self.counted, self.expected = 0, expected  # the latter None in the first run

    def keep(self, tensor: torch.Tensor) -> torch.Tensor | None:
        self.counted += 1
        return None if self.expected is None else tensor.detach()  # an output that keeps itself would stay for ever


@contextmanager
def _innermost(run: _Run | None) -> Iterator[None]:
    outer, _runs.innermost = getattr(_runs, "innermost", None), run
    try:
        yield
    finally:
        _runs.innermost = outer


@contextmanager
def _run(expected: int | None) -> Iterator[_Run]:
    """While inside, a block runs with a graph."""
    run = _Run(expected)
    with _innermost(run), torch.enable_grad(), saved_tensors_hooks(run.keep, lambda kept: kept):
        yield run


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, boundary, parameters, hidden):  # type: ignore[no-untyped-def]
        ctx.call, ctx.dtype, ctx.wanted = call, hidden.dtype, hidden.requires_grad
        ctx.autocast, random = _autocast(hidden.device.type), _random_states(hidden.device)
        with _run(None) as run:
            output = call(hidden.detach().requires_grad_(ctx.wanted))
        ctx.counted = run.counted
        drew = not all(map(torch.equal, random, _random_states(hidden.device)))
        ctx.save_for_backward(*boundary, *(random if drew else ()))
        ctx.parts = len(boundary)
        ctx.set_materialize_grads(False)
        if isinstance(output, torch.Tensor):
            return output.detach()
        ctx.mark_non_differentiable(*(x for x in output if isinstance(x, torch.Tensor) and not x.is_floating_point()))
        return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in output)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (x, *scale), random = ctx.saved_tensors[: ctx.parts], ctx.saved_tensors[ctx.parts :]
        hidden = expand_rows(x, scale[0], ctx.dtype) if scale else x.detach()
        hidden.requires_grad_(ctx.wanted)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(**ctx.autocast))
            if random:
                stack.enter_context(torch.random.fork_rng([hidden.device] if hidden.is_cuda else []))
                _set_random_states(hidden.device, random)
            run = stack.enter_context(_run(ctx.counted))
            output = ctx.call(hidden)
        if run.counted != ctx.counted:
            raise RuntimeError(
                f"a checkpointed block kept {ctx.counted} tensors when it first ran but {run.counted} when it ran again: it has "
                "to do the same both times"
            )
        parts = (output,) if isinstance(output, torch.Tensor) else output
        ways = [pair for pair in zip(parts, grads, strict=True) if pair[1] is not None and pair[0].requires_grad]
        if ways:
            number = start(*zip(*ways, strict=True))
            del output, parts, ways
            number.backward()
        return None, None, None, hidden.grad


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


def _set_random_states(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
