"""A block that keeps nothing for backward but its input, and runs again there.

    forward    y = block(x); each tensor that an operation would keep is counted and dropped
    backward   when the first of them is wanted: block(x̃) as far as the last of them is made, then backward as ever

Kept: x, or x in 8 bits a value and one scale a row. x̃ is what was kept: x itself, or x rounded, with an error of at most
1/254 of the row's largest value. The forward values are exact either way; with "int8" the gradient is that at x̃. The second
run has the random numbers and the autocast of the first; a random state is kept only if the first run drew from it. What
comes after the last kept tensor does not run again, and an operation that makes nothing else can ask `nothing_reads`.
Source: Chen et al. 2016, arXiv 1604.06174; with hooks on saved tensors as PyTorch's non-reentrant checkpoint.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks

from edge_kernels.quant import expand_rows, quantise_rows

Output: TypeAlias = torch.Tensor | tuple[Any, ...]
_again = threading.local()  # left: tensors that the second run in this thread has still to give


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
            places.extend(tensor.new_empty(self._blocks, *tensor.shape).unbind())
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
        block: a module or function of (hidden, *args, **kwargs); gives a tensor, or a tuple of them and anything else.
        hidden: (..., n) of any float type.
        args, kwargs: masks, positions. They are kept as they are.
        keep: "input" keeps hidden, which costs nothing where something else holds it; "int8" 1 byte a value.
        kept: where a copy of it goes; None keeps it where it is.

    Raises:
        ValueError: keep is neither, or hidden is of no float type.
        RuntimeError: in backward, when the second run kept other tensors than the first.
    """
    if keep not in ("input", "int8"):
        raise ValueError(f'keep is {keep!r}, but has to be "input" or "int8"')
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, but has to be of a float type")
    trains = any(p.requires_grad for p in block.parameters()) if isinstance(block, torch.nn.Module) else True
    if not torch.is_grad_enabled() or not (trains or hidden.requires_grad):
        return block(hidden, *args, **kwargs)
    boundary = (hidden.detach(),) if keep == "input" else quantise_rows(hidden.detach())
    if kept is not None:
        boundary = tuple(map(kept.copy, boundary))
    run = _Run(lambda x: block(x, *args, **kwargs), hidden, boundary)
    with saved_tensors_hooks(run.count, run.recall):
        output = block(hidden, *args, **kwargs)
    run.end(hidden.device)
    return output


def nothing_reads(saved: int) -> bool:
    """Whether a block runs again and, with so many more tensors saved, stops: then an operation's result is not needed."""
    return getattr(_again, "left", None) == saved


class _Done(Exception):
    """Ends the second run."""


class _Run:
    """What a block keeps, and the tensors that it makes again when the first of them is asked for."""

    def __init__(
        self, call: Callable[[torch.Tensor], Output], hidden: torch.Tensor, boundary: tuple[torch.Tensor, ...]
    ) -> None:
        self.call, self.dtype, self.wanted, self.boundary = call, hidden.dtype, hidden.requires_grad, boundary
        self.autocast = _autocast(hidden.device.type)
        self.random: list[torch.Tensor] | None = _random_states(hidden.device)
        self.counted = 0
        self.made: dict[int, torch.Tensor] = {}

    def count(self, tensor: torch.Tensor) -> int:
        """In the first run: a number in the tensor's place."""
        self.counted += 1
        return self.counted - 1

    def end(self, device: torch.device) -> None:
        """After the first run: the random state from before it is kept if it drew."""
        if self.random is not None and all(map(torch.equal, self.random, _random_states(device))):
            self.random = None

    def recall(self, number: int) -> torch.Tensor:
        """In backward: the tensor of a number, handed over; asked for again, the block runs once more."""
        if number not in self.made:
            self._run_again()
        return self.made.pop(number)

    def _run_again(self) -> None:
        x, *scale = self.boundary
        hidden = expand_rows(x, scale[0], self.dtype) if scale else x.detach()
        hidden.requires_grad_(self.wanted)
        self.made = {}
        outer, _again.left = getattr(_again, "left", None), self.counted
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(**self.autocast))
            if self.random is not None:
                stack.enter_context(torch.random.fork_rng([hidden.device] if hidden.is_cuda else []))
                _set_random_states(hidden.device, self.random)
            stack.enter_context(saved_tensors_hooks(self._hold, _never))
            try:
                self.call(hidden)
            except _Done:
                pass
            finally:
                _again.left = outer
        if len(self.made) != self.counted:
            raise RuntimeError(
                f"a checkpointed block kept {self.counted} tensors when it first ran but {len(self.made)} when it ran again: "
                "it has to do the same both times"
            )

    def _hold(self, tensor: torch.Tensor) -> None:
        self.made[len(self.made)] = tensor.detach()
        _again.left -= 1
        if not _again.left:
            raise _Done


def _never(_: None) -> torch.Tensor:
    raise RuntimeError("the graph of a block's second run has no backward")


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
