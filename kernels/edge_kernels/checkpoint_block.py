"""A block that keeps only its input for backward, and runs again there.

    forward    y = block(x); its graph is freed at once, and the tensors it would keep are counted
    backward   block(x̃) again, then the gradients of its input and of the parameters in its graph

Kept for backward: x, or x in 8 bits a value with one float32 scale a row, max |x| / 127. x̃ is what
was kept: x itself, or x rounded, with an error of at most 1/254 of the row's largest value. The
forward values are exact in either case; with "int8" the gradient is that at x̃. The second run has
the random numbers and the autocast of the first; a random state is kept only if the first run drew
from it. In the second run an operation whose result nothing reads need not compute it: it asks
`nothing_reads`.

The graph of the first run must not stay, even without its tensors: its hundreds of small objects
would lie in the heap among the block's large tensors, and the memory of one block would not fit the
next. Source: Chen et al. 2016, arXiv 1604.06174.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks

from edge_kernels.backend import row_pieces
from edge_kernels.quant import PIECE_VALUES

Output: TypeAlias = torch.Tensor | tuple[Any, ...]
_runs = threading.local()  # attribute `innermost`: the run of a block in this thread


class Kept:
    """Memory for the inputs of all blocks of a pass; tensors of one kind share one piece.

    A separate piece for each would lie among the tensors that its block allocates and frees, and
    leave holes on both sides that the next block's tensors do not fit.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._places: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the next free place; a piece lives as long as one of its places."""
        places = self._places.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        if not places:
            piece = tensor.new_empty(self._blocks, *tensor.shape).untyped_storage()
            # not views of one tensor: autograd would take a write to one for a change of all
            places.extend(
                tensor.new_empty(0).set_(piece, n * tensor.numel(), tensor.shape) for n in range(self._blocks)
            )
        return places.pop().copy_(tensor)


def checkpoint_block(
    block: Callable[..., Output],
    hidden: torch.Tensor,
    *args: Any,
    keep: Literal["input", "int8"] = "input",
    storage: Kept | None = None,
    **kwargs: Any,
) -> Output:
    """Run a block and return its result; its inner activations exist only while it runs.

    The block runs once more in backward. It has to do the same in both runs: a block that changes a
    cache of keys does not.

    Args:
        block: returns a tensor, or a tuple of tensors and of values that hold no tensor.
        hidden: (..., n) of any float dtype.
        *args: masks, positions. They are kept as they are, and get no gradients.
        **kwargs: as args.
        keep: "input" keeps hidden, which costs nothing where something else holds it; "int8" keeps
            one byte a value.
        storage: memory to which the kept tensors are copied; None: they stay in place.

    Raises:
        ValueError: keep is neither, hidden has no float dtype, or another argument requires a
            gradient.
        RuntimeError: in backward, if the second run kept another number of tensors than the first.
    """
    if keep not in ("input", "int8"):
        raise ValueError(f'keep is {keep!r}, but has to be "input" or "int8"')
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, but has to be of a float dtype")
    if not torch.is_grad_enabled():
        return block(hidden, *args, **kwargs)
    for name, value in (*enumerate(args, 1), *kwargs.items()):
        if any(map(_requires_grad, _parts(value))):
            raise ValueError(
                f"argument {name} wants a gradient, but only hidden and the block's own tensors get one"
            )
    boundary = (hidden.detach(),) if keep == "input" else quantise_rows(hidden.detach())
    if storage is not None:
        boundary = tuple(map(storage.copy, boundary))

    def call(x: torch.Tensor) -> Output:
        return block(x, *args, **kwargs)

    random, leaf = (_random_states(hidden.device), hidden.detach().requires_grad_(hidden.requires_grad))
    with _run(None) as run:
        output = call(leaf)
    results = _parts(output)
    parts = tuple(result.detach() if isinstance(result, torch.Tensor) else result for result in results)
    if any(map(_requires_grad, results)):
        constant = [part for part, result in zip(parts, results, strict=True) if not _requires_grad(result)]
        drew = not all(map(torch.equal, random, _random_states(hidden.device)))
        first = _FirstRun(call, _autocast(hidden.device.type), run.counted, _leaves(results, leaf))
        parts = _Block.apply(first, boundary, random if drew else [], parts, constant, hidden, *first.leaves)
    return parts if isinstance(output, tuple) else parts[0]


def nothing_reads(requires: tuple[bool, ...], saved: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether an operation may leave its result uncomputed.

    That is so in the second run of a block, where the operation saves the block's last tensors:
    backward needs only saved tensors. An operation that calls others in its own forward runs them
    in `innermost(None)`, since their saved tensors are not kept.

    Args:
        requires: the operation's ctx.needs_input_grad; where none is set, its saved tensors are not
            kept.
        saved: the tensors that the operation saves for backward.
    """
    run: _Run | None = getattr(_runs, "innermost", None)
    if run is None or not any(requires):
        return False
    return run.counted + sum(part is not None for part in saved) == run.expected


def start(parts: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number whose backward continues to the parts with the given gradients.

    Passing gradients to torch as arguments would import SymPy first: 30 MiB.
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
        self.counted = 0
        self.expected = expected  # the count of the first run; None during the first run

    def keep(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The hook of a saved tensor."""
        self.counted += 1
        # detached: an output that keeps itself would never be freed
        return None if self.expected is None else tensor.detach()


@contextmanager
def innermost(run: _Run | None) -> Iterator[None]:
    """Inside, operations are a part of this run; with None, of no block's run."""
    outer, _runs.innermost = getattr(_runs, "innermost", None), run
    try:
        yield
    finally:
        _runs.innermost = outer


@contextmanager
def _run(expected: int | None) -> Iterator[_Run]:
    """Inside, a block runs with a graph, and its saved tensors are counted."""
    run = _Run(expected)
    with innermost(run), torch.enable_grad(), saved_tensors_hooks(run.keep, lambda saved: saved):
        yield run


def _leaves(parts: tuple[Any, ...], hidden: torch.Tensor) -> list[torch.Tensor]:
    """The leaves of the graph of parts, without the input."""
    nodes = [part.grad_fn for part in parts if isinstance(part, torch.Tensor) and part.grad_fn is not None]
    visited, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves += [node.variable] if node.variable is not hidden else []
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                nodes.append(following)
    return leaves


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


class _FirstRun(NamedTuple):
    """What the second run of a block repeats."""

    call: Callable[[torch.Tensor], Output]  # the block with its arguments
    autocast: dict[str, Any]  # arguments of torch.autocast
    counted: int  # tensors that the block's operations kept
    leaves: list[torch.Tensor]  # of the block's graph, without the input


class _Block(torch.autograd.Function):
    """Connects the results with the input and the leaves.

    The leaves are inputs of the Function, so that a leaf that several blocks share has its whole
    gradient before any hook sees it.
    """

    @staticmethod
    def forward(ctx, first, boundary, random, parts, constant, hidden, *leaves):  # type: ignore[no-untyped-def]
        ctx.first, ctx.dtype, ctx.count = first, hidden.dtype, len(boundary)
        ctx.save_for_backward(*boundary, *random)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(part for part in constant if isinstance(part, torch.Tensor)))
        return parts

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        first: _FirstRun = ctx.first
        (x, *scale), random = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        hidden = expand_rows(x, scale[0], ctx.dtype) if scale else x.detach()
        hidden.requires_grad_(ctx.needs_input_grad[5])
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(**first.autocast))
            if random:
                stack.enter_context(torch.random.fork_rng([hidden.device] if hidden.is_cuda else []))
                torch.set_rng_state(random[0])
                if hidden.is_cuda:
                    torch.cuda.set_rng_state(random[1], hidden.device)
            run = stack.enter_context(_run(first.counted))
            output = first.call(hidden)
        if run.counted != first.counted:
            raise RuntimeError(
                f"a checkpointed block kept {first.counted} tensors when it first ran but {run.counted} when it "
                "ran again: it has to do the same in both runs"
            )
        pairs = [(part, grad) for part, grad in zip(_parts(output), grads, strict=True) if grad is not None]
        inputs = [hidden, *first.leaves] if hidden.requires_grad else first.leaves
        number = start(*zip(*pairs, strict=True))
        del output, pairs, grads  # the graph alone holds what it still needs
        gradients = torch.autograd.grad(number, inputs, allow_unused=True)
        return (None,) * 5 + (gradients if hidden.requires_grad else (None, *gradients))


def _autocast(device: str) -> dict[str, Any]:
    """Arguments of torch.autocast for its present state, without its cache.

    Older torch would serve the second run from the cache of the first, whose casts have no graph.
    """
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
        "cache_enabled": False,
    }


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round (..., n) of any float dtype to quants (..., n) int8 and scale (..., 1) float32."""
    rows = x.reshape(-1, x.shape[-1])
    quants = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(rows), 1, device=x.device)
    for piece in row_pieces(rows.shape, PIECE_VALUES):
        scale[piece] = rows[piece].abs().amax(-1, keepdim=True).float() / 127
        quants[piece] = (rows[piece] / scale[piece].clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return quants.view(x.shape), scale.view(*x.shape[:-1], 1)


def expand_rows(quants: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """quants · scale in a float dtype: the inverse of quantise_rows, up to the rounding."""
    x = torch.empty(quants.shape, dtype=dtype, device=quants.device)
    rows, scales = quants.reshape(-1, quants.shape[-1]), scale.reshape(-1, 1)
    for piece in row_pieces(rows.shape, PIECE_VALUES):
        x.view(rows.shape)[piece] = rows[piece] * scales[piece]
    return x
