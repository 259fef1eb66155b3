"""What the planner needs to know of a machine: cores, memory, GPU. Plain data; `probe` and `profile_of` make it.

On a Jetson the GPU has no memory of its own: it works in RAM, and what the GPU takes the CPU no
longer has. Then `unified_memory` is true and the two memory figures of the GPU are those of the RAM.
Never add them up.
"""

import msgspec


class Gpu(msgspec.Struct, frozen=True):
    """One GPU: the one a trainer would use."""

    name: str
    compute_capability: str | None  # of CUDA, such as "8.7"; None: the driver did not say
    memory_total_bytes: int  # its own memory; with unified memory the RAM, as limited by the cgroup
    memory_available_bytes: int | None  # free when the driver was asked; None: it did not say


class Profile(msgspec.Struct, frozen=True):
    """A machine as a trainer process would find it."""

    board: str | None  # a key of `boards()`; None: the machine is no known board
    description: str  # for people: the board's title, else the CPU's model
    os: str
    machine: str  # x86_64 or aarch64
    # that this process may use, by its affinity and by its cgroup's CPU quota, rounded up
    cpu_cores: int
    ram_total_bytes: int  # RAM, or the cgroup's memory limit where that is lower
    # that can be taken without swapping, by the kernel's estimate and by the cgroup's limit
    ram_available_bytes: int
    swap_total_bytes: int
    disk_free_bytes: int  # free to this user on the file system of the current folder
    unified_memory: bool  # the GPU works in RAM: its memory and `ram_*` are the same bytes
    gpu: Gpu | None
