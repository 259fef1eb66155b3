"""Base weights that stay in files: a block's packed matrices are in memory while it runs, and no longer.

    folder/LAYER.safetensors    the packed matrices of a block, by the layer's number in the whole checkpoint

The files are written once, block by block, and mapped: what is read again and again is the system's page cache, which gives
way to whoever needs the memory.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from edge_broker import files
from edge_kernels import Packed
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from edge_runtime.errors import InputError
from edge_runtime.models.packed import PackedLinear

LOCK_TIMEOUT_S = 600.0


def stream(block: nn.Module, matrices: Mapping[str, Callable[[], Packed]], file: Path, device: str) -> None:
    """Let a block read its matrices from a file each time it runs.

    Args:
        block: whose linear layers at these paths are PackedLinear already, without weights.
        matrices: reads each layer's matrix, for a file that is not there yet.
        file: what earlier runs wrote is taken as it is.

    Raises:
        InputError: when the block runs and the file cannot be read.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # several agents of one machine may share the cache
    with FileLock(file.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
        if not file.exists():
            _write({path: read() for path, read in matrices.items()}, file)
    forms = {}
    for path in matrices:
        layer = block.get_submodule(path)
        assert isinstance(layer, PackedLinear)
        forms[layer] = (path, layer.weight)
    block.forward = partial(_run, block.forward, forms, file, device)


def _run(
    forward: Callable[..., Any],
    layers: Mapping[PackedLinear, tuple[str, Packed]],
    file: Path,
    device: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            names = set(tensors.keys())
            for layer, (path, without) in layers.items():
                keys = [f"{path}.{part}" for part in Packed._fields[2:]]
                layer.weight = Packed(
                    *without[:2], *(tensors.get_tensor(key) if key in names else None for key in keys)
                )
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}, made of the model's weights, cannot be read: {error}; remove it"
        ) from error
    try:
        return forward(*args, **kwargs)
    finally:
        for layer, (_, without) in layers.items():
            layer.weight = without


def _write(matrices: Mapping[str, Packed], file: Path) -> None:
    tensors = {
        f"{path}.{name}": part.contiguous()
        for path, matrix in matrices.items()
        for name, part in zip(Packed._fields[2:], matrix.parts, strict=True)
        if part is not None
    }
    fresh = file.with_suffix(".part")
    save_file(tensors, fresh)
    files.put(fresh, file)


def empty(format: Any, shape: tuple[int, int], device: str) -> Packed:
    """What stands for a matrix while its block does not run: its format and shape alone."""
    nothing = torch.empty(0, device=device)
    return Packed(format, shape, nothing, nothing)
