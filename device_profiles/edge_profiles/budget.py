"""How much memory a trainer may take when nobody has said.

    GPU with its own memory     available GPU memory - max(256 MiB, 1/16 of its total)
    unified memory, or no GPU   0.85 · available RAM - 256 MiB

The reserve on a GPU covers windows that may yet open and what an allocator loses to fragmentation. In RAM it covers the
agent and its peaks while a delta is encoded and sent; the 0.85 leaves the kernel page cache to read weights and data
through, and keeps the rest of the machine from the out-of-memory killer. These shares are this project's choice, not
measured optima.
"""

from edge_profiles.profile import Profile
from edge_profiles.sizes import MIB

RESERVE_BYTES = 256 * MIB
RAM_SHARE_PERCENT = 85
GPU_RESERVE_DIVISOR = 16


def default_budget_bytes(profile: Profile) -> int:
    """Return the bytes a trainer process may take by default, its CUDA context and libraries included.

    With a GPU that has its own memory: what is available there (its total, where that is not known) less the larger
    of 256 MiB and 1/16 of the GPU's total; the budget then bounds GPU memory, not RAM. With unified memory or without
    a GPU: 85 % of the available RAM less 256 MiB. Never below 0, which means that nothing can be trained now.
    """
    gpu = profile.gpu
    if gpu is not None and not profile.unified_memory:
        available = (
            gpu.memory_total_bytes if gpu.memory_available_bytes is None else gpu.memory_available_bytes
        )
        budget = available - max(RESERVE_BYTES, gpu.memory_total_bytes // GPU_RESERVE_DIVISOR)
    else:
        budget = profile.ram_available_bytes * RAM_SHARE_PERCENT // 100 - RESERVE_BYTES
    return max(budget, 0)
