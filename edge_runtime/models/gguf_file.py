"""Reads base weights out of a GGUF file, tensor by tensor, a few rows at a time.

An index of the tensors is made once. Names and block formats are the `gguf` package's. The
family's row says which of llama.cpp's conversions are undone: interleaved rows of query and key
heads, and an offset in the norms.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch
from edge_kernels import Packed
from edge_kernels.quant import from_gguf
from numpy.typing import NDArray

from edge_runtime.errors import InputError
from edge_runtime.models import gguf_config
from edge_runtime.models.gguf_header import Contents
from edge_runtime.models.readers import FLOATS, PIECE_VALUES, Shape, Tensors, join


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of a GGUF file, under the model's name for it."""

    offset: int  # its first byte in the file
    kind: int  # gguf.GGMLQuantizationType
    shape: Shape  # as torch has it
    interleaved_heads: int = 0  # heads whose rows are interleaved; 0: none are
    added: float = 0.0  # by llama.cpp to every value, and subtracted again
    transposed: bool = False  # the model has (in, out), the file (out, in)
    shard: int = 0  # number of its file, of a model that is split over files


def index(contents: Contents, shapes: dict[str, Shape], config: Any) -> dict[str, Tensor]:
    """Find the tensors of a model in a GGUF file, every tensor of which has to be one of them.

    Args:
        contents: of the file.
        shapes: by the names in the model's state_dict.
        config: gguf_config.configuration of the file.

    Raises:
        InputError: a tensor is missing, has another shape, is in a format that cannot be expanded,
            or has no place in the model.
    """
    path, family = contents.files[0], gguf_config.family(contents)
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family.gguf]
    gguf_names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    interleaved = {}  # heads, by the name of the linear layer
    if family.gguf_interleaved:
        interleaved = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    linears = tuple(f"{layer}.weight" for layer in family.linears.values())
    left, tensors = dict(contents.tensors), {}
    for name, shape in shapes.items():
        inner = gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        if (place := left.pop(inner, None)) is None:
            raise InputError(f"{path} lacks the tensor {inner or name}")
        kind = gguf.GGMLQuantizationType(place.kind)
        if not _expandable(kind):
            raise InputError(f"{path}: {inner} is held in {kind.name}, which cannot be expanded to numbers")
        transposed = family.transposed and name.endswith(linears)
        if place.shape != (shape[::-1] if transposed else shape):
            raise InputError(f"{path}: {inner} is {place.shape}, but this model needs {shape}")
        added = family.norm_offset if inner.endswith("norm.weight") else 0.0
        heads = interleaved.get(inner.split(".")[-2], 0)
        tensors[name] = Tensor(place.first, place.kind, place.shape, heads, added, transposed, place.shard)
    if unknown := sorted(left.keys() - {*family.gguf_keys.divisors}):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(
            f"{path} has tensors that such a model has no place for: {', '.join(unknown[:3])}{more}"
        )
    return tensors


@functools.cache
def _expandable(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the `gguf` package expands blocks of this kind, which only an attempt shows."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@dataclass(frozen=True)
class GGUFTensors(Tensors):
    """Reads tensors of a GGUF file by the model's names."""

    files: list[Path]  # one, or those of a split model
    tensors: dict[str, Tensor]

    def read(self, name: str) -> tuple[Shape, Iterator[torch.Tensor]]:
        """The shape of a tensor, and its values in float32."""
        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        pieces = (gguf.quants.dequantize(blocks, kind) for blocks in self._blocks(tensor))
        added = np.float32(tensor.added)
        return tensor.shape, (
            torch.from_numpy(piece.astype(np.float32, copy=False) - added) for piece in pieces
        )

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor as the model has it."""
        tensor = super().dense(name, dtype)
        return tensor.T.contiguous() if self.tensors[name].transposed else tensor

    def packed(self, name: str, format: str) -> Packed:
        """One matrix in a block format; the file's own blocks where they have this format."""
        tensor = self.tensors[name]
        if gguf.GGMLQuantizationType(tensor.kind).name.lower() != format:
            return super().packed(name, format)
        rows, width = tensor.shape
        pieces = (
            from_gguf(torch.from_numpy(blocks), format, (len(blocks), width))  # type: ignore[arg-type]
            for blocks in self._blocks(tensor)
        )
        return join(pieces, rows)

    def rounding(self, name: str) -> float:
        """Of b bits a value 2^(3 - b): normal values change by half of that or less, in 2 bits too."""
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.tensors[name].kind)]
        return max(FLOATS, 2.0 ** (3 - 8 * size / values))

    def _blocks(self, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        """A few of the model's rows at a time, in the file's format, (rows, bytes of a row)."""
        heads, block = tensor.interleaved_heads, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        width = 1 if heads and len(tensor.shape) == 1 else tensor.shape[-1]  # a bias has a value a row
        rows, row_bytes = math.prod(tensor.shape) // width, width // block[0] * block[1]
        step = rows // heads if heads else max(PIECE_VALUES // width, 1)
        path = self.files[tensor.shard]
        with path.open("rb") as stream:
            stream.seek(tensor.offset)
            for first in range(0, rows, step):
                size = min(step, rows - first) * row_bytes
                blocks = np.fromfile(stream, np.uint8, size)
                if blocks.size != size:
                    raise InputError(f"{path} is cut short: {size - blocks.size} bytes are missing")
                if heads:  # in the file, rows of a head's two halves alternate
                    blocks = blocks.reshape(-1, 2, row_bytes).swapaxes(0, 1)
                yield blocks.reshape(-1, row_bytes)
