"""Caps the GPU memory of the trainer, so that a large GPU stands for a small board's."""

import torch
from edge_profiles import format_size

from edge_runtime.errors import InputError


def cap_gpu(cap_bytes: int) -> None:
    """Let torch's allocator fail beyond cap_bytes; call it before anything is allocated.

    CUDA's own memory (its context, some hundred MiB) is not the allocator's and comes on top.

    Raises:
        InputError: the GPU has less memory than that.
    """
    total = int(torch.cuda.get_device_properties(0).total_memory)
    if cap_bytes > total:
        raise InputError(f"the GPU has {format_size(total)} and cannot be capped to {format_size(cap_bytes)}")
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total)
