"""Measures the peak memory of each phase of the trainer process.

    CPU              peak resident size as Linux counts it (VmHWM in /proc/self/status), reset at the
                     start of each phase through /proc/self/clear_refs
    GPU              the allocator's peak of reserved bytes
    unified memory   the sum of both, as CUDA allocates from the same DRAM, but outside the resident
                     size; the two peaks need not coincide, so the sum is an upper bound
    no /proc         psutil's resident size at the end of a phase, which may miss a peak inside it

Other views of the same memory are recorded beside the peak (protocol.report.PhaseMemory).
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import msgspec
import psutil
import torch
from edge_profiles import cgroups

from edge_runtime.protocol.report import PhaseMemory
from edge_runtime.trainer.job import Progress

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def release() -> None:
    """Return freed heap to the system; glibc kept 150 MiB after ten steps of varying lengths."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


class Meter:
    """Memory and seconds by phase."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.unified = self.cuda and bool(torch.cuda.get_device_properties(0).is_integrated)
        self.phases: dict[str, PhaseMemory] = {}
        self.seconds: dict[str, float] = {}
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the code inside; a second run of a phase keeps the higher figures and adds seconds."""
        self._reset()
        self._phase = name
        started = monotonic()
        try:
            yield
        finally:
            self.lap()
            self.seconds[name] = self.seconds.get(name, 0.0) + monotonic() - started

    def lap(self) -> int:
        """Peak bytes since the phase or its last lap began; the phase's is the highest of its laps."""
        memory = self._memory()
        self.phases[self._phase] = _higher(self.phases.get(self._phase), memory)
        self._reset()
        return memory.peak_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all phases."""
        return max(phase.peak_bytes for phase in self.phases.values())

    def current_bytes(self) -> int:
        """Bytes that the process holds now, counted as the peak is."""
        reserved = int(torch.cuda.memory_reserved()) if self.cuda else 0
        return reserved + (_resident("VmRSS") if self._in_ram else 0)

    @property
    def _in_ram(self) -> bool:
        return self.unified or not self.cuda

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


class Reporter(NamedTuple):
    """Where the stages of a job report their progress."""

    meter: Meter
    say: Callable[[Progress], None]

    def tell(self, phase: str, step: int = 0, of: int = 0, loss: float | None = None) -> None:
        """Report a phase, at a step of so many, with the memory that the process holds."""
        self.say(Progress(phase, step, of, loss, self.meter.current_bytes()))


def _higher(earlier: PhaseMemory | None, memory: PhaseMemory) -> PhaseMemory:
    if earlier is None:
        return memory
    sizes = zip(msgspec.structs.astuple(earlier), msgspec.structs.astuple(memory), strict=True)
    return PhaseMemory(*(max(pair, key=lambda size: size or 0) for pair in sizes))


def _resident(field: str) -> int:
    return _status(field) or int(psutil.Process().memory_info().rss)


def _status(field: str) -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0
