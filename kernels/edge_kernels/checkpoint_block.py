"""A block that keeps nothing for backward but its input, and runs again there.

    forward    y = block(x), whose graph goes at once; the tensors that it would keep are counted
    backward   block(x̃) again, and the gradients of its input and of the parameters in its graph

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
from typing import Any, Literal, NamedTuple, TypeAlias

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

    It has to do the same when it runs again: a block that changes a cache of keys does not.

    Args:
        block: a module or function of (hidden, *args, **kwargs); gives a tensor, or a tuple of them and of what holds none.
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
    if not torch.is_grad_enabled():
        return block(hidden, *args, **kwargs)
    for name, value in (*enumerate(args, 1), *kwargs.items()):
        if any(map(_wants_gradient, _parts(value))):
            raise ValueError(
                f"argument {name} wants a gradient, but only hidden and what the block itself holds get theirs"
            )
    boundary = (hidden.detach(),) if keep == "input" else quantise_rows(hidden.detach())
    if kept is not None:
        boundary = tuple(map(kept.copy, boundary))

    def call(x: torch.Tensor) -> Output:
        return block(x, *args, **kwargs)

    random, leaf = (_random_states(hidden.device), hidden.detach().requires_grad_(hidden.requires_grad))
    with _run(None) as run:
        output = call(leaf)
    results = _parts(output)
    parts = tuple(result.detach() if isinstance(result, torch.Tensor) else result for result in results)
    if any(map(_wants_gradient, results)):
        constant = [part for part, result in zip(parts, results, strict=True) if not _wants_gradient(result)]
        drew = not all(map(torch.equal, random, _random_states(hidden.device)))
        leaves = _leaves(results, leaf)
        again = _Again(
            call, hidden.dtype, hidden.requires_grad, _autocast(hidden.device.type), run.counted, leaves
        )
        parts = _Block.apply(again, boundary, random if drew else [], parts, constant, hidden, *leaves)
    return parts if isinstance(output, tuple) else parts[0]


def nothing_reads(wanted: tuple[bool, ...], saved: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether an operation's result may be anything: a block runs again, and after what this one saves nothing more is kept.

    An operation that calls others in its own forward does so in `without_blocks`: what they save is not kept.

    Args:
        wanted: its ctx.needs_input_grad; without any, what it saves is not kept either.
        saved: what it saves for backward.
    """
    run: _Run | None = getattr(_runs, "innermost", None)
    return (
        any(wanted)
        and run is not None
        and run.counted + sum(part is not None for part in saved) == run.expected
    )


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
        grads, ctx.grads = ctx.grads, None
        return None, *grads


class _Run:
    """Counts the tensors that a block's operations keep for backward while it runs."""

    def __init__(self, expected: int | None) -> None:
        self.counted, self.expected = 0, expected  # the latter None in the first run

    def keep(self, tensor: torch.Tensor) -> torch.Tensor | None:
        self.counted += 1
        return (
            None if self.expected is None else tensor.detach()
        )  # an output that keeps itself would stay for ever


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


class _Again(NamedTuple):
    """What the second run needs beside what is kept. counted: tensors that the first kept; leaves: that want gradients."""

    call: Callable[[torch.Tensor], Output]
    dtype: torch.dtype
    wanted: bool
    autocast: dict[str, Any]
    counted: int
    leaves: list[torch.Tensor]


def _leaves(parts: tuple[Any, ...], hidden: torch.Tensor) -> list[torch.Tensor]:
    """The leaves of the parts' graph but the input."""
    nodes = [part.grad_fn for part in parts if isinstance(part, torch.Tensor) and part.grad_fn is not None]
    seen, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves += [node.variable] if node.variable is not hidden else []
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return leaves


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


class _Block(torch.autograd.Function):
    """The leaves are inputs, so that one that several blocks share has its whole gradient before anything is done with it."""

    @staticmethod
    def forward(ctx, again, boundary, random, parts, constant, hidden, *leaves):  # type: ignore[no-untyped-def]
        ctx.again, ctx.count = again, len(boundary)
        ctx.save_for_backward(*boundary, *random)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(part for part in constant if isinstance(part, torch.Tensor)))
        return parts

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        again, count = ctx.again, ctx.count
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        (x, *scale), random = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        hidden = expand_rows(x, scale[0], again.dtype) if scale else x.detach()
        hidden.requires_grad_(again.wanted)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(**again.autocast))
            if random:
                stack.enter_context(torch.random.fork_rng([hidden.device] if hidden.is_cuda else []))
                _set_random_states(hidden.device, random)
            run = stack.enter_context(_run(again.counted))
            output = again.call(hidden)
        if run.counted != again.counted:
            raise RuntimeError(
                f"a checkpointed block kept {again.counted} tensors when it first ran but {run.counted} when it ran again: it "
                "has to do the same both times"
            )
        ways = [(part, grad) for part, grad in zip(_parts(output), grads, strict=True) if grad is not None]
        wanted = [hidden, *again.leaves] if again.wanted else again.leaves
        number = start(*zip(*ways, strict=True))
        del output, ways, grads
        found = torch.autograd.grad(number, wanted, allow_unused=True)
        return (None,) * 5 + (found if again.wanted else (None, *found))


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
