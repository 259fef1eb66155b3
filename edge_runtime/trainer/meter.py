"""Holds the trainer process to its share of the machine, and measures the peak memory of each phase.

    CPU              peak resident size as Linux counts it (VmHWM in /proc/self/status), reset at the
                     start of each phase through /proc/self/clear_refs
    GPU              the allocator's peak of reserved bytes
    unified memory   the sum of both, as CUDA allocates from the same DRAM, but outside the resident
                     size; the two peaks need not coincide, so the sum is an upper bound
    no /proc         psutil's resident size at the end of a phase, which may miss a peak inside it

Other views of the same memory are recorded beside the peak (protocol.report.PhaseMemory).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import msgspec
import psutil
import torch
from edge_profiles import cgroups, format_size

from edge_runtime.errors import InputError
from edge_runtime.protocol.report import PhaseMemory
from edge_runtime.trainer.job import Machine, Progress

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def prepare(machine: Machine) -> None:
    """Hold this process to its share of the machine, before anything is allocated.

    Beyond gpu_cap_bytes torch's allocator fails, so that a large GPU stands for a small board's.
    CUDA's own memory (its context, some hundred MiB) is not the allocator's and comes on top.

    Raises:
        InputError: torch cannot use the GPU, or the GPU has less memory than the cap.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this device has a GPU, but the installed torch cannot use it: install its CUDA build, "
            "or use --device cpu"
        )
    if machine.gpu_cap_bytes is not None:
        total, cap = int(torch.cuda.get_device_properties(0).total_memory), machine.gpu_cap_bytes
        if cap > total:
            raise InputError(f"the GPU has {format_size(total)} and cannot be capped to {format_size(cap)}")
        torch.cuda.set_per_process_memory_fraction(cap / total)
    if machine.threads:
        torch.set_num_threads(machine.threads)


class Meter:
    """Memory and seconds of a job by phase, and its lines of progress."""

    def __init__(self, device: str, say: Callable[[Progress], None] = lambda _: None) -> None:
        """say: receives each line of progress."""
        self.cuda, self._say = device.startswith("cuda"), say
        unified = self.cuda and bool(torch.cuda.get_device_properties(0).is_integrated)
        self._in_ram = unified or not self.cuda
        self.phases: dict[str, PhaseMemory] = {}
        self.seconds: dict[str, float] = {}
        self._phase = ""

    def tell(self, phase: str, step: int = 0, of: int = 0, loss: float | None = None, text: str = "") -> None:
        """Report progress: a phase, at a step of so many, and the bytes that the process holds now.

        text: for this device's screen alone.
        """
        reserved = int(torch.cuda.memory_reserved()) if self.cuda else 0
        held = reserved + (_resident("VmRSS") if self._in_ram else 0)
        self._say(Progress(phase, step, of, loss, held, text))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the code inside; a second run of a phase keeps the higher figures and adds seconds.

        A phase inside another is measured alone, and its seconds are part of the other's.
        """
        around = self._phase
        if around:
            self.lap()
        self._reset()
        self._phase = name
        started = monotonic()
        try:
            yield
        finally:
            self.lap()
            self._phase = around
            self.seconds[name] = self.seconds.get(name, 0.0) + monotonic() - started

    def lap(self) -> int:
        """Peak bytes since the phase or its last lap began; the phase's is the highest of its laps."""
        memory = self._memory()
        earlier = self.phases.get(self._phase, memory)
        sizes = zip(msgspec.structs.astuple(earlier), msgspec.structs.astuple(memory), strict=True)
        self.phases[self._phase] = PhaseMemory(*(max(pair, key=lambda size: size or 0) for pair in sizes))
        self._reset()
        return memory.peak_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all phases."""
        return max(phase.peak_bytes for phase in self.phases.values())

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if CLEAR.exists():
            CLEAR.write_text("5")

    def _memory(self) -> PhaseMemory:
        resident = _resident("VmHWM")
        allocated = reserved = driver = None
        if self.cuda:
            allocated = int(torch.cuda.max_memory_allocated())
            reserved = int(torch.cuda.max_memory_reserved())
            free, total = torch.cuda.mem_get_info()
            driver = int(total - free)
        return PhaseMemory(
            peak_bytes=(reserved or 0) + (resident if self._in_ram else 0),
            resident_peak_bytes=resident if self.cuda else None,
            anonymous_bytes=_status("RssAnon") or None,
            file_mapped_bytes=_status("RssFile") + _status("RssShmem") or None,
            cgroup_peak_bytes=cgroups.peak_memory(),
            allocated_peak_bytes=allocated,
            reserved_peak_bytes=reserved,
            driver_bytes=driver,
        )


def _resident(field: str) -> int:
    return _status(field) or int(psutil.Process().memory_info().rss)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status; 0 where there is none."""
    for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
