"""Reads base weights out of a GGUF file, tensor by tensor, a few rows at a time.

An index of the tensors is made once. Names and block formats are the `gguf` package's. The family's
row says which of llama.cpp's conversions are undone: interleaved rows of query and key heads, and an
offset in the norms.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import msgspec
import numpy as np
import torch
from edge_kernels import Packed, pack
from edge_kernels.quant import from_gguf
from numpy.typing import NDArray

from edge_runtime.errors import InputError
from edge_runtime.models import headers
from edge_runtime.models.families import FAMILIES, family_of
from edge_runtime.models.packed import join_pieces, join_rows, pack_pieces

PIECE_BYTES = 4 << 20  # read at once, counted as float32


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of a GGUF file, under the model's name for it."""

    offset: int  # its first byte in the file
    kind: int  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # as torch has it
    interleaved_heads: int = 0  # heads whose rows are interleaved; 0: none are
    added: float = 0.0  # to be subtracted from every value

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def order(self) -> torch.Tensor | None:
        """For each row of the model's tensor its row in the file; None where they are the same."""
        if not self.interleaved_heads:
            return None
        return torch.arange(self.shape[0]).view(self.interleaved_heads, -1, 2).transpose(1, 2).flatten()


def index(path: Path, names: list[str], config: Any) -> dict[str, Tensor]:
    """Find the tensors of a model in a GGUF file.

    Args:
        path: the GGUF file.
        names: the model's state_dict keys.
        config: its transformers configuration.

    Raises:
        InputError: the family is not read from GGUF files, a tensor is missing, or a tensor is in a
            format that cannot be expanded.
    """
    family = family_of(config.model_type)
    if family.gguf is None:
        architectures = ", ".join(dict.fromkeys(row.gguf for row in FAMILIES if row.gguf))
        raise InputError(
            f"{path}: GGUF files of {config.model_type} are not supported; known: {architectures}"
        )
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family.gguf]
    gguf_names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    places, tensors = headers.tensors(path), {}
    for name in names:
        inner = gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        if inner not in places:
            raise InputError(f"{path} lacks the tensor {inner or name}")
        place = places[inner]
        kind = gguf.GGMLQuantizationType(place.kind)
        if not _expandable(kind):
            raise InputError(f"{path}: {inner} is held in {kind.name}, which cannot be expanded to numbers")
        heads = 0
        if family.gguf_interleaved and ".attn_q." in inner:
            heads = config.num_attention_heads
        elif family.gguf_interleaved and ".attn_k." in inner:
            heads = config.num_key_value_heads
        added = family.norm_offset if inner.endswith("norm.weight") else 0.0
        tensors[name] = Tensor(place.first, place.kind, place.shape, heads, added)
    return tensors


@functools.cache
def _expandable(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the `gguf` package expands blocks of this kind; it tells only when it is asked to."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class GGUFTensors(NamedTuple):
    """Reads tensors of a GGUF file by the model's names."""

    path: Path
    tensors: dict[str, Tensor]

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor in the given dtype; at most PIECE_BYTES are expanded at a time."""
        tensor = self.tensors[name]
        values = join_rows(self._expanded(tensor), tensor.shape, dtype)
        return values if tensor.order is None else values[tensor.order]

    def packed(self, name: str, format: str) -> Packed:
        """One matrix in a block format; the file's own blocks where they have this format."""
        if format == "nf4":  # quantises the scales of all rows together
            return pack(self.dense(name, torch.float32), "nf4")
        tensor = self.tensors[name]
        if gguf.GGMLQuantizationType(tensor.kind).name.lower() == format:
            pieces = (
                from_gguf(torch.from_numpy(blocks), format, (len(blocks), tensor.shape[-1]))  # type: ignore[arg-type]
                for blocks in self._blocks(tensor)
            )
            matrix = join_pieces(pieces, tensor.rows)
        else:
            matrix = pack_pieces(self._expanded(tensor), format, tensor.rows)
        return matrix if tensor.order is None else matrix.rows(tensor.order)

    def _expanded(self, tensor: Tensor) -> Iterator[torch.Tensor]:
        """A few rows at a time, in float32."""
        for blocks in self._blocks(tensor):
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(tensor.kind))
            yield torch.from_numpy(values.astype(np.float32, copy=False) - np.float32(tensor.added))

    def _blocks(self, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        """A few rows at a time as they lie in the file, (rows, bytes of a row)."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        step = max(PIECE_BYTES // (4 * tensor.shape[-1]), 1)
        row_bytes = tensor.shape[-1] // block * block_bytes
        with self.path.open("rb") as stream:
            stream.seek(tensor.offset)
            for first in range(0, tensor.rows, step):
                size = min(step, tensor.rows - first) * row_bytes
                blocks = np.fromfile(stream, np.uint8, size)
                if blocks.size != size:
                    raise InputError(f"{self.path} is cut short: {size - blocks.size} bytes are missing")
                yield blocks.reshape(-1, row_bytes)
