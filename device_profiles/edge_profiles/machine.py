"""Look at this machine: cores, memory, disk, GPU, and whether it is a board we know.

A Jetson or a Raspberry Pi names itself in /proc/device-tree/model, which ends in a NUL byte.
Containers hide the device tree; a Jetson's firmware then still has its name in DMI. Memory comes from
psutil and is lowered to the cgroup's limit.
"""

import os
import platform
from pathlib import Path

import psutil

from edge_profiles import cgroups, gpus, known
from edge_profiles.profile import Gpu, Profile

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # how Windows and macOS call the two


def probe(root: Path = Path("/")) -> Profile:
    """Return the profile of this machine as it is now.

    A source that is missing leaves its part out. A GPU driver that does not answer is given up after
    20 s.

    Args:
        root: where /proc and /sys are found.

    Raises:
        ProfileError: a board file of this package is broken.
    """
    ram = psutil.virtual_memory()
    total, available = cgroups.limit_memory(ram.total, ram.available, root)
    model = cgroups.text(root / "proc/device-tree/model").rstrip("\0").strip()
    dmi = cgroups.text(root / "sys/devices/virtual/dmi/id/product_name").strip()
    # ram.total, not the cgroup's limit, tells an 8 GB board from a 16 GB one
    board = next((b for name in (model, dmi) if name and (b := known.recognise_model(name, ram.total))), None)
    description = board.title if board else model or _cpu_model(root)
    sighting = gpus.find()
    if board is None and sighting is not None and sighting.memory_total_bytes is not None:
        board = known.recognise_gpu(sighting.name, sighting.memory_total_bytes)
    gpu, unified = _gpu(sighting, board, total, available)
    machine = platform.machine().lower()
    # those that the process may run on, where the system says so
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Profile(
        board=board.name if board else None,
        description=description,
        os=f"{platform.system()} {platform.release()}".strip(),
        machine=_MACHINES.get(machine, machine),
        cpu_cores=cgroups.limit_cores(cores, root),
        ram_total_bytes=total,
        ram_available_bytes=available,
        swap_total_bytes=psutil.swap_memory().total,
        disk_free_bytes=psutil.disk_usage(".").free,
        unified_memory=unified,
        gpu=gpu,
    )


def _gpu(
    sighting: gpus.Sighting | None, board: known.Board | None, ram_total: int, ram_available: int
) -> tuple[Gpu | None, bool]:
    """The GPU, and whether it works in RAM; the board fills in what the driver does not say."""
    on_board = board.gpu if board is not None else None
    unified = board is not None and board.unified_memory
    if sighting is not None:
        capability = sighting.compute_capability or (on_board.compute_capability if on_board else None)
        if unified or sighting.memory_total_bytes is None:
            return Gpu(sighting.name, capability, ram_total, ram_available), True
        total, available = sighting.memory_total_bytes, sighting.memory_available_bytes
        return Gpu(sighting.name, capability, total, available), False
    # JetPack 5 and older have neither NVML nor nvidia-smi
    if unified and on_board is not None and not gpus.hidden():
        return Gpu(on_board.name, on_board.compute_capability, ram_total, ram_available), True
    return None, unified


def _cpu_model(root: Path) -> str:
    for line in cgroups.text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine() or "unknown CPU"
