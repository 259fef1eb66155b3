"""Measures the peak memory of each phase of the trainer process.

On a CPU and on unified memory: the peak resident size as Linux counts it (VmHWM in /proc/self/status), set back at the
start of each phase through /proc/self/clear_refs. On a GPU of its own memory: the allocator's peak of reserved bytes.
Where /proc is not there, psutil's resident size at the end of a phase stands in, which may miss a peak inside it.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import psutil
import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def release() -> None:
    """Give freed heap back to the system: glibc keeps it else, here some 150 MiB after ten steps of varying lengths."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


class Meter:
    """Peaks in bytes and durations in seconds, by phase."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._highest = 0  # of the laps of this phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a phase that runs twice keeps its higher peak and adds its times."""
        self._reset()
        self._highest = 0
        started = monotonic()
        try:
            yield
        finally:
            self.lap()
            self.peaks[name] = max(self.peaks.get(name, 0), self._highest)
            self.seconds[name] = self.seconds.get(name, 0.0) + monotonic() - started

    def lap(self) -> int:
        """The peak since the phase or its last lap began; the phase's own is the highest of them."""
        peak = self._peak()
        self._highest = max(self._highest, peak)
        self._reset()
        return peak

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all phases."""
        return max(self.peaks.values())

    def current_bytes(self) -> int:
        """What the process holds now."""
        return (
            int(torch.cuda.memory_reserved()) if self.cuda else _status("VmRSS") or psutil.Process().memory_info().rss
        )

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            CLEAR.write_text("5")

    def _peak(self) -> int:
        if self.cuda:
            return int(torch.cuda.max_memory_reserved())
        return _status("VmHWM") or psutil.Process().memory_info().rss


def _status(field: str) -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0
