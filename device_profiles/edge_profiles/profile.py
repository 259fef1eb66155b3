"""What the planner needs to know of a machine: cores, memory, GPU. Plain data; `probe` and `profile_of` make it.

On a Jetson the GPU has no memory of its own: it works in RAM, and what the GPU takes the CPU no longer has. Then
`unified_memory` is true and the two memory figures of the GPU are those of the RAM. Never add them up.
"""

import msgspec


class Gpu(msgspec.Struct, frozen=True):
    """One GPU: the one a trainer would use."""

    name: str
    compute_capability: str | None
    """Of CUDA, such as "8.7"; None where nobody could be asked."""
    memory_total_bytes: int
    """The GPU's own memory; with unified memory the RAM, as limited by the cgroup."""
    memory_available_bytes: int | None
    """What is free at the time of asking; None where nobody could be asked."""


class Profile(msgspec.Struct, frozen=True):
    """A machine as a trainer process would find it."""

    board: str | None
    """Name of the known board, when it was recognised: a key of `boards()`."""
    description: str
    """For people: the board's title, else the CPU's model."""
    os: str
    machine: str
    """x86_64 or aarch64."""
    cpu_cores: int
    """Cores this process may use: by its affinity and by the CPU quota of its cgroup, rounded up."""
    ram_total_bytes: int
    """RAM, or the memory limit of the cgroup where that is lower."""
    ram_available_bytes: int
    """What may still be taken without swapping, by the kernel's own estimate and by the cgroup's limit."""
    swap_total_bytes: int
    disk_free_bytes: int
    """Free to this user on the file system of the path that was asked about."""
    unified_memory: bool
    """The GPU works in RAM: its memory and `ram_*` are the same bytes."""
    gpu: Gpu | None
