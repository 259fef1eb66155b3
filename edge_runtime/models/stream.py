"""Base weights that stay in files: a block's packed matrices are in memory only while it runs.

    FOLDER/LAYER.safetensors    packed matrices of a block, by the layer's number in the checkpoint

A file is written once and then mapped. The system's page cache keeps its bytes as long as nobody
needs the memory.
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
PARTS = Packed._fields[2:]  # its tensors; format and shape come before


def stream(block: nn.Module, matrices: Mapping[str, Callable[[], Packed]], file: Path, device: str) -> None:
    """Make a block read its matrices from a file each time it runs.

    Args:
        block: its linear layers at these paths are PackedLinear, with `placeholder` weights.
        matrices: by the layer's path, a function that reads its matrix where the file is missing.
        file: used as it is where an earlier run wrote it.
        device: "cpu" or "cuda".

    Raises:
        InputError: when the block runs, the file cannot be read.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # several agents of one machine may share the cache
    with FileLock(file.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
        if not file.exists():
            _write({path: read() for path, read in matrices.items()}, file)
    layers = {}
    for path in matrices:
        layer: Any = block.get_submodule(path)
        layers[path] = layer, layer.weight
    block.forward = partial(_run, block.forward, layers, file, device)


def placeholder(format: Any, shape: tuple[int, int], device: str) -> Packed:
    """Stands for a matrix while its block does not run: format, shape and device alone."""
    empty = torch.empty(0, device=device)
    return Packed(format, shape, empty, empty)


def _run(
    forward: Callable[..., Any],
    layers: Mapping[str, tuple[PackedLinear, Packed]],
    file: Path,
    device: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            names = set(tensors.keys())
            for path, (layer, empty) in layers.items():
                keys = [f"{path}.{part}" for part in PARTS]
                parts = (tensors.get_tensor(key) if key in names else None for key in keys)
                layer.weight = Packed(empty.format, empty.shape, *parts)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}, made of the model's weights, cannot be read: {error}; remove it"
        ) from error
    try:
        return forward(*args, **kwargs)
    finally:
        for layer, empty in layers.values():
            layer.weight = empty


def _write(matrices: Mapping[str, Packed], file: Path) -> None:
    tensors = {
        f"{path}.{name}": part.contiguous()
        for path, matrix in matrices.items()
        for name, part in zip(PARTS, matrix.parts, strict=True)
        if part is not None
    }
    fresh = file.with_suffix(".part")
    save_file(tensors, fresh)
    files.put(fresh, file)
