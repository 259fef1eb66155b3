"""Compiles every kernel in every configuration for GPUs that are not present, and judges the code.

A configuration fails for one of three reasons: registers spill to memory; the kernel needs more
shared memory than a program of that architecture may have, which the compiler does not check; or
the kernel is declared as streamed and has no asynchronous copies, so it loads single values instead
of vectors. An operator takes part if its module has `ahead_of_time`, which yields its launches.
Source: `triton.compile` with a GPUTarget; the cubin's resources from Triton's own disassembler.
"""

import os
import pkgutil
import re
import struct
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import edge_kernels
from edge_kernels.backend import DTYPES, Launch, triton

# Shared memory that a program may have, in KiB, by architecture (87: sm_87).
# Source: CUDA C++ programming guide, technical specifications.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
ARCHITECTURES = tuple(SHARED_KIB)
TYPES = {torch.int8: "i8", torch.uint8: "u8", torch.int64: "i64", **{d: name for name, d in DTYPES.items()}}


@dataclass(frozen=True)
class Compiled:
    """The resources of one configuration on one architecture, and its faults."""

    operator: str
    name: str
    architecture: int
    registers: int  # a thread
    spilled_bytes: int  # a thread
    shared_bytes: int  # a program
    instructions: int  # of 16 bytes, padding included
    asynchronous_copies: int
    faults: tuple[str, ...]


def operators() -> list[str]:
    """Full names of the modules that have kernels."""
    names = [module.name for module in pkgutil.iter_modules(edge_kernels.__path__)]
    modules = [import_module(f"edge_kernels.{name}") for name in names if name not in ("__main__", "ahead")]
    return [module.__name__ for module in modules if hasattr(module, "ahead_of_time")]


def compile_all(modules: list[str], architectures: tuple[int, ...]) -> list[Compiled]:
    """Compile the launches of operators, one process a core. Triton's cache makes later runs short.

    Args:
        modules: names of modules with an `ahead_of_time`.
        architectures: 87 for sm_87.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if find_spec("triton") is None:
        raise RuntimeError("Triton is not installed, and is needed to compile: pip install triton")
    tasks = [(module, architecture) for module in modules for architecture in architectures]
    context, cores = get_context("spawn"), len(os.sched_getaffinity(0))
    # The variable has to be set before a process imports the operators: it makes `backend` import
    # Triton on a machine without a GPU.
    with (
        mock.patch.dict(os.environ, EDGE_KERNELS_AHEAD="1", TRITON_DISABLE_LINE_INFO="1"),
        ProcessPoolExecutor(cores, context) as pool,
    ):
        return list(chain.from_iterable(pool.map(_compile_operator, *zip(*tasks, strict=True))))


def _compile_operator(module: str, architecture: int) -> list[Compiled]:
    return [_judge(module, launch, architecture) for launch in import_module(module).ahead_of_time()]


def _judge(module: str, launch: Launch, architecture: int) -> Compiled:
    binary = _compile(launch, architecture)
    cubin, copies = binary.asm["cubin"], binary.asm["ptx"].count("cp.async.c")  # .ca, .cg: whole vectors
    registers, stack = _usage(cubin)
    shared, limit = int(binary.metadata.shared), SHARED_KIB[architecture] << 10
    faults = []
    if stack:
        faults.append(f"spills {stack} bytes a thread")
    if shared > limit:
        faults.append(
            f"takes {shared} bytes of shared memory, but a program of sm_{architecture} has {limit}"
        )
    if launch.streamed and not copies:
        faults.append("has no asynchronous copies: its loads are not vectors")
    numbers = (registers, stack, shared, _instructions(cubin), copies)
    return Compiled(module.rpartition(".")[2], launch.name, architecture, *numbers, tuple(faults))


def _compile(launch: Launch, architecture: int) -> Any:
    """Compile for what Triton specialises on: types, multiples of 16, and ones."""
    kernel, values = _recorded(launch)
    signature: dict[str, str] = {}
    constants, aligned = {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.pop(parameter.name)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        # torch's allocations are aligned, too; without this fact loads are not vectors
        if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=values)


def _recorded(launch: Launch) -> tuple[Any, dict[str, Any]]:
    """The kernel of a launch, and its arguments and compiler options by name."""
    calls = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        calls.append((kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named))

    with mock.patch.object(triton.JITFunction, "run", record):
        launch.function(*launch.arguments)
    assert len(calls) == 1, f"{launch.name} launches {len(calls)} kernels instead of one"
    return calls[0]


def _usage(cubin: bytes) -> tuple[int, ...]:
    """Registers, and bytes of stack, of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return tuple(int(re.findall(rf"{field}:(\d+)", text)[-1]) for field in ("REG", "STACK"))


def _instructions(cubin: bytes) -> int:
    """Instructions, of 16 bytes, in the sections of a 64-bit ELF file that hold code (flag 4)."""
    start, (count,) = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<H", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + 64 * index) for index in range(count)]
    return int(sum(size for _, _, flags, _, _, size in sections if flags & 4)) // 16
