"""Which backend an operator takes: Triton on a GPU that it compiles for, torch everywhere else.

Triton is optional, and imported only where a kernel can run or be compiled: with a torch that is built for CUDA, in the
interpreter (TRITON_INTERPRET=1), or ahead of time (EDGE_KERNELS_AHEAD=1, which `python -m edge_kernels check` sets). Else
`jit` leaves a kernel as it is and `tl` has no more than the annotations need, so that an operator's file can hold both of
its backends, and a process on a CPU does not pay for the compiler.
"""

import contextlib
import logging
import os
import types
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

triton: Any = None
tl: Any = types.SimpleNamespace(constexpr=int)
if torch.backends.cuda.is_built() or {"TRITON_INTERPRET", "EDGE_KERNELS_AHEAD"} & os.environ.keys():
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton had it before 3.10
    with contextlib.suppress(ImportError):
        triton, tl = import_module("triton"), import_module("triton.language")


def jit(kernel: Any) -> Any:
    """triton.jit where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)


log = logging.getLogger(__name__)
OLDEST = (8, 0)  # compute capability: Triton has no tensor cores before it


def on_triton(x: torch.Tensor) -> bool:
    """Whether the Triton backend takes this tensor; TRITON_INTERPRET=1 runs it on a CPU too, for tests."""
    if triton is None:
        return False
    return bool(triton.knobs.runtime.interpret) or (x.is_cuda and _new_enough(x.device.index or 0))


@cache
def _new_enough(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(index)
        log.warning(
            "%s is sm_%d%d, older than sm_80: operators run in torch instead of Triton", name, *capability
        )
    return capability >= OLDEST


class Launch(NamedTuple):
    """One configuration in which an operator launches a kernel: what `python -m edge_kernels check` compiles.

    kernel: the jitted function. signature: the type of each argument that is no constant, "*bf16", "*u8", "i32", "fp32";
    pointers and the names in `divisible` are multiples of 16, as torch's allocations and common widths are.
    constants: the constexpr arguments, BLOCK sizes and flags. streamed: whether its loads have to be asynchronous copies
    into shared memory (cp.async), as those of a pipelined product are.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    streamed: bool = False


def row_pieces(shape: Sequence[int], values: int) -> Iterator[slice]:
    """The rows of a matrix, so many values at a time: what a backend in torch has in float32 at once."""
    step = max(values // shape[1], 1)
    return (slice(first, first + step) for first in range(0, shape[0], step))


def row_tile(n: int) -> dict[str, int]:
    """Rows and columns that one program has, where it needs whole rows of n: a tile of 2048 values or one row."""
    columns = 1 << max(n - 1, 1).bit_length()
    rows = max(2048 // columns, 1)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(max(rows * columns // 512, 4), 16)}


def shared_bytes(capability: int) -> int:
    """Shared memory that one program may have: 80 -> sm_80. Source: CUDA C++ programming guide, technical specifications."""
    return {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}.get(capability, 99) << 10


def capability_of(x: torch.Tensor) -> int:
    """The compute capability of a tensor's device, as 87 for sm_87; in the interpreter that of an sm_80."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
