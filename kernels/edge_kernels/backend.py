"""Chooses the backend of an operator: Triton on a GPU that it compiles for, torch everywhere else.

Triton is optional. It is imported only where a kernel can run or be compiled: with a torch built
for CUDA, in Triton's interpreter (TRITON_INTERPRET=1), or for compiling ahead of time
(EDGE_KERNELS_AHEAD=1, which `python -m edge_kernels check` sets). Without Triton, `jit` returns a
kernel as it is and `tl` holds only what annotations need, so an operator's file can hold both
backends, and a process on a CPU does not load the compiler.
"""

import contextlib
import logging
import os
import types
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

triton: Any = None
tl: Any = types.SimpleNamespace(constexpr=int)
if torch.backends.cuda.is_built() or {"TRITON_INTERPRET", "EDGE_KERNELS_AHEAD"} & os.environ.keys():
    # Triton 3.10 turns the fusion of multiplications and additions off by default
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    with contextlib.suppress(ImportError):
        triton, tl = import_module("triton"), import_module("triton.language")

log = logging.getLogger(__name__)
OLDEST = (8, 0)  # compute capability: Triton uses no tensor cores below it
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by Triton's names


def jit(kernel: Any) -> Any:
    """triton.jit where Triton is imported, else the function itself."""
    return kernel if triton is None else triton.jit(kernel)


def on_triton(x: torch.Tensor) -> bool:
    """Whether the Triton backend takes this tensor; in the interpreter also a tensor on a CPU."""
    if triton is None or not x.numel():
        return False
    return bool(triton.knobs.runtime.interpret) or (x.is_cuda and _supported(x.device.index or 0))


@cache
def _supported(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(index)
        log.warning(
            "%s is sm_%d%d, older than sm_80: operators run in torch instead of Triton", name, *capability
        )
    return capability >= OLDEST


class Launch(NamedTuple):
    """A launch of one kernel, which `python -m edge_kernels check` compiles ahead of time.

    The check calls `function(*arguments)` with tensors that have no memory. It records the kernel
    and the types, alignments and block sizes that the launch would pass to Triton.
    """

    name: str  # operator, dtype and whatever else chooses the configuration
    function: Callable[..., object]  # launches one kernel
    arguments: tuple[Any, ...]
    streamed: bool = False  # whether the loads must be asynchronous copies into shared memory (cp.async)


def blank(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without memory, for a Launch."""
    return torch.empty(shape, dtype=dtype, device="meta")


def row_pieces(shape: Sequence[int], values: int) -> Iterator[slice]:
    """Cut the rows of a matrix into pieces of at most `values` numbers, but at least one row.

    A torch backend holds one such piece in float32 at a time.
    """
    step = max(values // shape[1], 1)
    return (slice(first, first + step) for first in range(0, shape[0], step))
