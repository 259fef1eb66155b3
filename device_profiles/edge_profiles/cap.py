"""How far to hold a process back on a large GPU so that it has no more than a board would leave it."""

from edge_profiles.errors import ProfileError
from edge_profiles.known import Board, boards, profile_of
from edge_profiles.profile import Profile
from edge_profiles.sizes import format_size


def gpu_cap_bytes(board: Board, machine: Profile) -> int:
    """Return the bytes of this machine's GPU that a process may take to stand for the board.

    This is the memory that the board's GPU works in, less the share of driver, system and desktop.

    Raises:
        ProfileError: the board or this machine has no GPU, or this machine's GPU is smaller than that.
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
