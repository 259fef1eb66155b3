"""Holds the trainer to less of a GPU than there is, so that a large one stands for a small board's."""

import torch
from edge_profiles import format_size

from edge_runtime.errors import InputError


def cap_gpu(cap_bytes: int) -> None:
    """Let torch's allocator fail beyond so many bytes; comes before anything is allocated.

    What CUDA itself takes (its context, some hundred MiB) is not the allocator's and comes on top.

    Raises:
        InputError: the GPU has less.
    """
    total = int(torch.cuda.get_device_properties(0).total_memory)
    if cap_bytes > total:
        raise InputError(f"the GPU has {format_size(total)} and cannot be capped to {format_size(cap_bytes)}")
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total)
