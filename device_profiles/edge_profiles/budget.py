"""How much memory a trainer may take: by default, and to stand for a smaller board.

    GPU with its own memory     available GPU memory - max(256 MiB, 1/16 of its total)
    unified memory, or no GPU   0.85 · available RAM - 256 MiB

The reserve on a GPU covers windows that may yet open and what an allocator loses to fragmentation.
In RAM it covers the agent and its peaks while a delta is encoded and sent; the 0.85 leaves the kernel
page cache to read weights and data through, and keeps the rest of the machine from the out-of-memory
killer. These shares are this project's choice, not measured optima.
"""

from edge_profiles.errors import ProfileError
from edge_profiles.known import Board, boards, profile_of
from edge_profiles.profile import Profile
from edge_profiles.sizes import MIB, format_size

RESERVE_BYTES = 256 * MIB
RAM_SHARE_PERCENT = 85
GPU_RESERVE_DIVISOR = 16


def default_budget_bytes(profile: Profile) -> int:
    """Return the bytes a trainer may take by default, its CUDA context and libraries included.

    On a GPU with its own memory the budget bounds that memory, not RAM. 0: nothing can be trained.
    """
    gpu = profile.gpu
    if gpu is not None and not profile.unified_memory:
        available = gpu.memory_available_bytes
        # the total, where the driver did not say what is free
        available = gpu.memory_total_bytes if available is None else available
        budget = available - max(RESERVE_BYTES, gpu.memory_total_bytes // GPU_RESERVE_DIVISOR)
    else:
        budget = profile.ram_available_bytes * RAM_SHARE_PERCENT // 100 - RESERVE_BYTES
    return max(budget, 0)


def gpu_cap_bytes(board: Board, machine: Profile) -> int:
    """Return the bytes of this machine's GPU that a process may take to stand for the board.

    This is the memory that the board's GPU works in, less the share of driver, system and desktop.

    Raises:
        ProfileError: the board or this machine has no GPU, or this machine's GPU is smaller.
    """
    gpu = profile_of(board).gpu
    if gpu is None:
        able = ", ".join(name for name, candidate in boards().items() if candidate.gpu is not None)
        raise ProfileError(
            f"board {board.name} has no GPU whose memory could be capped; boards with one: {able}"
        )
    left = gpu.memory_available_bytes
    assert left is not None  # every board file states what it reserves
    if machine.gpu is None:
        raise ProfileError(f"this machine has no GPU that could be capped to the memory of {board.name}")
    if machine.gpu.memory_total_bytes < left:
        raise ProfileError(
            f"{machine.gpu.name} has {format_size(machine.gpu.memory_total_bytes)}, but {board.name} leaves a process "
            f"{format_size(left)}: choose a smaller board or a larger GPU"
        )
    return left
