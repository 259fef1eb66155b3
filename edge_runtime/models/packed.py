"""A base model's modules whose matrices stay packed (formats: edge_kernels.quant), and files.

A linear layer expands its matrix a tile or a matrix at a time while it computes; the embedding
expands only the rows of a batch. The matrices of a block can also stay in a file. They are then in
memory only while the block runs:

    FOLDER/LAYER.safetensors    packed matrices of a block, by the layer's number in the checkpoint

A file is written once and then mapped. The system's page cache keeps its bytes as long as nobody
needs the memory.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from edge_kernels import Packed, expand, packed_linear
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from edge_runtime.errors import InputError
from edge_runtime.state import once

DTYPE = torch.bfloat16  # of activations and biases
# of embedding and head: each row is a token, and 4 bits are too few for rare tokens
EMBEDDING = "q8_0"
PARTS = Packed._fields[2:]  # its tensors; format and shape come before


class PackedLinear(nn.Module):
    """A frozen linear layer; its weight is Packed, which has a shape and a device like a tensor."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return packed_linear(x, self.weight, self.bias)


class PackedEmbedding(nn.Module):
    """A frozen embedding, whose rows are multiplied by a factor."""

    def __init__(self, weight: Packed, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = weight, factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., hidden)."""
        rows = expand(self.weight.rows(ids.reshape(-1)), DTYPE).view(*ids.shape, -1)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor, dtype=DTYPE)


def stream(block: nn.Module, matrices: Mapping[str, Callable[[], Packed]], file: Path, device: str) -> None:
    """Make a block read its matrices from a file each time it runs.

    Args:
        block: its linear layers at these paths are PackedLinear; their weights have a format and a
            shape, and no values.
        matrices: by the layer's path, a function that reads its matrix where the file is missing.
        file: used as it is where an earlier run wrote it.
        device: "cpu" or "cuda".

    Raises:
        InputError: when the block runs, the file cannot be read.
    """
    # several agents of one machine may share the cache
    once(file, lambda fresh: _write({path: read() for path, read in matrices.items()}, fresh))
    layers: dict[str, Any] = {path: block.get_submodule(path) for path in matrices}
    empty = {path: layer.weight for path, layer in layers.items()}
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with safe_open(file, framework="pt", device=device) as tensors:
                names = set(tensors.keys())
                for path, layer in layers.items():
                    keys = [f"{path}.{part}" for part in PARTS]
                    parts = (tensors.get_tensor(key) if key in names else None for key in keys)
                    layer.weight = Packed(*empty[path][:2], *parts)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}, made of the model's weights, cannot be read: {error}; remove it"
            ) from error
        try:
            return forward(*args, **kwargs)
        finally:
            for path, layer in layers.items():
                layer.weight = empty[path]

    block.forward = run


def _write(matrices: Mapping[str, Packed], fresh: Path) -> None:
    tensors = {
        f"{path}.{name}": part.contiguous()
        for path, matrix in matrices.items()
        for name, part in zip(PARTS, matrix.parts, strict=True)
        if part is not None
    }
    save_file(tensors, fresh)
