"""The NVIDIA GPU a trainer would use, found without torch: NVML by ctypes, else the nvidia-smi program.

CUDA_VISIBLE_DEVICES is obeyed: its first entry (an index or a UUID) is the GPU asked about; empty or
-1 hides all. An index counts as NVML does, by PCI bus; CUDA counts so too under
CUDA_DEVICE_ORDER=PCI_BUS_ID, and otherwise puts the fastest card first. A driver that does not answer
is left alone after a time: asking never hangs and never raises.

A GPU that works in RAM (Jetson, GB10) reports its memory as not supported; here that is
`memory_total_bytes` None.
Sources: NVML API reference; the fields of `nvidia-smi --help-query-gpu`.
"""

import ctypes
import logging
import os
import re
import subprocess
import threading

import msgspec

from edge_profiles.sizes import MIB

TIMEOUT_S = 10.0  # starting NVML takes seconds where the driver does not stay loaded

_log = logging.getLogger(__name__)


class Sighting(msgspec.Struct, frozen=True):
    """What the driver says of a GPU; None where it says nothing."""

    name: str
    compute_capability: str | None
    memory_total_bytes: int | None
    memory_available_bytes: int | None


def find(timeout_s: float = TIMEOUT_S) -> Sighting | None:
    """Return the GPU a trainer would use, or None; after 2 · timeout_s at the latest."""
    gpu = selected()
    if hidden():
        return None
    answers: list[Sighting | None] = []
    # on a thread of its own, which a stuck driver may keep
    thread = threading.Thread(target=lambda: answers.append(ask_nvml(gpu)), name="nvml", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        _log.warning("NVML did not answer within %g s; going on without it", timeout_s)
    return (answers[0] if answers else None) or ask_nvidia_smi(gpu, timeout_s)


def hidden() -> bool:
    """Tell whether CUDA_VISIBLE_DEVICES hides every GPU from this process."""
    return selected() in ("", "-1")


def selected() -> str:
    """Return the index or UUID of the GPU that CUDA would show first."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]  # nvmlMemory_t


def ask_nvml(gpu: str, library: str = "libnvidia-ml.so.1") -> Sighting | None:
    """Ask the driver's library; None where it is missing, does not start or lacks the GPU."""
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:
            return None
        try:
            return _ask_device(nvml, gpu)
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):  # AttributeError: a function this old or stubbed library lacks
        return None


def _ask_device(nvml: ctypes.CDLL, gpu: str) -> Sighting | None:
    device, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
    if gpu.isdecimal():
        status = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(gpu)), ctypes.byref(device))
    else:
        status = nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(device))
    if status != 0 or nvml.nvmlDeviceGetName(device, name, ctypes.c_uint(len(name))) != 0:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    capable = nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0
    own_memory = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0 and memory.total > 0
    return Sighting(
        name=name.value.decode("utf-8", "replace"),
        compute_capability=f"{major.value}.{minor.value}" if capable else None,
        memory_total_bytes=memory.total if own_memory else None,
        memory_available_bytes=memory.free if own_memory else None,
    )


# "NVIDIA GeForce RTX 3060, 8.6, 12288, 11900" (MiB); unknown fields print as "[N/A]"
_ROW = re.compile(
    r"(?P<name>\S.*?), (?P<capability>\d+\.\d+|\[.+?\]), (?P<total>\d+|\[.+?\]), (?P<free>\d+|\[.+?\])"
)


def ask_nvidia_smi(gpu: str, timeout_s: float = TIMEOUT_S) -> Sighting | None:
    """Ask the program on PATH; None where it is missing, fails, is slow or prints another form."""
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=name,compute_cap,memory.total,memory.free"]
    command += ["--format=csv,noheader,nounits"]
    try:
        finished = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=True
        )
    except subprocess.TimeoutExpired:
        _log.warning("nvidia-smi did not answer within %g s; going on without it", timeout_s)
        return None
    except (OSError, subprocess.SubprocessError):
        return None
    row = _ROW.fullmatch(finished.stdout.decode("utf-8", "replace").strip())
    if row is None:
        return None
    capability, total, free = row["capability"], row["total"], row["free"]
    return Sighting(
        name=row["name"],
        compute_capability=None if capability.startswith("[") else capability,
        memory_total_bytes=int(total) * MIB if total.isdecimal() else None,
        memory_available_bytes=int(free) * MIB if free.isdecimal() else None,
    )
