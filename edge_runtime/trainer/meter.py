"""Measures the peak memory of each phase of the trainer process.

On a CPU: the peak resident size as Linux counts it (VmHWM in /proc/self/status), set back at the start of each phase
through /proc/self/clear_refs. On a GPU of its own memory: the allocator's peak of reserved bytes. On unified memory: the sum
of both, for CUDA's allocations come out of the same DRAM but are not in the resident size; as the two peaks need not fall
together, it is at most so much. Where /proc is not there, psutil's resident size at the end of a phase stands in, which may
miss a peak inside it. Beside the peak stand the system's other views of the same memory (see job.PhaseMemory).
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import msgspec
import psutil
import torch
from edge_profiles import cgroups

from edge_runtime.protocol.report import PhaseMemory

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def release() -> None:
    """Give freed heap back to the system: glibc keeps it else, here some 150 MiB after ten steps of varying lengths."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


class Meter:
    """Memory and durations in seconds, by phase."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.unified = self.cuda and bool(torch.cuda.get_device_properties(0).is_integrated)
        self.phases: dict[str, PhaseMemory] = {}
        self.seconds: dict[str, float] = {}
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a phase that runs twice keeps the higher of each figure and adds its times."""
        self._reset()
        self._phase = name
        started = monotonic()
        try:
            yield
        finally:
            self.lap()
            self.seconds[name] = self.seconds.get(name, 0.0) + monotonic() - started

    def lap(self) -> int:
        """The peak since the phase or its last lap began; the phase's is the highest of them."""
        memory = self._memory()
        self.phases[self._phase] = _higher(self.phases.get(self._phase), memory)
        self._reset()
        return memory.peak_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all phases."""
        return max(phase.peak_bytes for phase in self.phases.values())

    def current_bytes(self) -> int:
        """What the process holds now, counted as the peak is."""
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
            allocated, reserved = (
                int(torch.cuda.max_memory_allocated()),
                int(torch.cuda.max_memory_reserved()),
            )
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


def _higher(one: PhaseMemory | None, other: PhaseMemory) -> PhaseMemory:
    if one is None:
        return other
    sizes = zip(msgspec.structs.astuple(one), msgspec.structs.astuple(other), strict=True)
    return PhaseMemory(*(max(pair, key=lambda size: size or 0) for pair in sizes))


def _resident(field: str) -> int:
    return _status(field) or int(psutil.Process().memory_info().rss)


def _status(field: str) -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0
