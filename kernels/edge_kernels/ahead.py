"""Compiles every kernel in every configuration for GPUs that are not there, and refuses what would run badly on them.

A configuration fails if registers spill to memory, if it needs more shared memory than a program of that architecture may
have (the compiler does not look), or if it is declared as streamed and has no asynchronous copies: loads of single values
instead of vectors. Operators are found by their `ahead_of_time`.
Source: `triton.compile` with a GPUTarget; the cubin's resources from the disassembler that comes with Triton.
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import edge_kernels
from edge_kernels.backend import Launch, shared_bytes, triton

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)


@dataclass(frozen=True)
class Compiled:
    """What one configuration takes on one architecture, and why it fails (empty: it does not)."""

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
    names = [f"edge_kernels.{module.name}" for module in pkgutil.iter_modules(edge_kernels.__path__)]
    others = ("__main__", "ahead", "bench")
    modules = [import_module(name) for name in names if name.split(".")[1] not in others]
    return [module.__name__ for module in modules if hasattr(module, "ahead_of_time")]


def compile_all(modules: list[str], architectures: tuple[int, ...]) -> list[Compiled]:
    """Compile the configurations of operators, a process a core. Triton's cache keeps what they took long for.

    Args:
        modules: names of modules with an `ahead_of_time`.
        architectures: 87 for sm_87.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if find_spec("triton") is None:
        raise RuntimeError("Triton is not installed, and is needed to compile: pip install triton")
    groups = [(module, architecture) for module in modules for architecture in architectures]
    context, cores = get_context("spawn"), len(os.sched_getaffinity(0))
    # a process of its own sees the variable before it imports the operators, so that backend imports Triton without a GPU
    with (
        mock.patch.dict(os.environ, EDGE_KERNELS_AHEAD="1", TRITON_DISABLE_LINE_INFO="1"),
        ProcessPoolExecutor(cores, context) as pool,
    ):
        counts = list(pool.map(_count, *zip(*groups, strict=True)))
        tasks = [
            (*group, index) for group, count in zip(groups, counts, strict=True) for index in range(count)
        ]
        return list(pool.map(_compile_one, *zip(*tasks, strict=True), chunksize=4))


def _count(module: str, architecture: int) -> int:
    return len(import_module(module).ahead_of_time(architecture))


def _compile_one(module: str, architecture: int, index: int) -> Compiled:
    launch = import_module(module).ahead_of_time(architecture)[index]
    return _compile_launch(module.rpartition(".")[2], launch, architecture)


def _compile_launch(operator: str, launch: Launch, architecture: int) -> Compiled:
    binary = _compile(launch, architecture)
    registers, stack = _usage(binary.asm["cubin"])
    copies = binary.asm["ptx"].count("cp.async.c")  # .ca, .cg: copies of whole vectors
    instructions = _code_bytes(binary.asm["cubin"]) // 16
    shared, most = int(binary.metadata.shared), shared_bytes(architecture)
    faults = []
    if stack:
        faults.append(f"spills {stack} bytes a thread")
    if shared > most:
        faults.append(f"takes {shared} bytes of shared memory, but a program of sm_{architecture} has {most}")
    if launch.streamed and not copies:
        faults.append("has no asynchronous copies: its loads are not vectors")
    numbers = (registers, stack, shared, instructions, copies)
    return Compiled(operator, launch.name, architecture, *numbers, tuple(faults))


def _compile(launch: Launch, architecture: int) -> Any:
    kernel_names = launch.kernel.arg_names
    signature = {name: launch.signature.get(name, "constexpr") for name in kernel_names}
    constants = {(kernel_names.index(name),): value for name, value in launch.constants.items()}
    aligned = [
        name for name, kind in launch.signature.items() if kind.startswith("*") or name in launch.divisible
    ]
    attributes = {(kernel_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    target = import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=target, options=options)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack that a thread has."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", text)[-1]) for what in ("REG", "STACK"))
    return registers, stack


def _code_bytes(cubin: bytes) -> int:
    """Bytes of machine code: of the sections of a 64-bit ELF file that hold instructions (flag 4)."""
    start, (count,) = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<H", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + 64 * index) for index in range(count)]
    return sum(size for _, _, flags, _, _, size in sections if flags & 4)
