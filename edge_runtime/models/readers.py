"""Sources of a model's tensors: safetensors files, a GGUF file (gguf_file.py), random numbers."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from edge_kernels import Packed, pack
from safetensors import SafetensorError, safe_open

from edge_runtime.errors import InputError

PIECE_VALUES = 1 << 20  # read or packed at once
Shape = tuple[int, ...]


class Tensors:
    """A model's tensors by their names in its state_dict: dense, or packed in a block format."""

    def read(self, name: str) -> tuple[Shape, Iterable[torch.Tensor]]:
        """The shape of a tensor, and its values in order, a few rows at a time."""
        raise NotImplementedError

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor; only one piece of it is held beside the result."""
        shape, pieces = self.read(name)
        tensor, filled = torch.empty(shape, dtype=dtype), 0
        for piece in pieces:
            tensor.view(-1)[filled : filled + piece.numel()] = piece.view(-1)
            filled += piece.numel()
        return tensor

    def packed(self, name: str, format: str) -> Packed:
        """One matrix, which is never whole in float32 unless the format is nf4."""
        if format == "nf4":  # quantises the scales of all rows together
            return pack(self.dense(name, torch.float32), "nf4")
        (rows, _), pieces = self.read(name)
        return join((pack(piece, format) for piece in pieces), rows)  # type: ignore[arg-type]


def join(pieces: Iterable[Packed], rows: int) -> Packed:
    """One packed matrix of pieces with `rows` rows in all; one piece is held at a time."""
    matrix, filled = None, 0
    for piece in pieces:
        if matrix is None:
            empty = (None if part is None else part.new_empty(rows, *part.shape[1:]) for part in piece.parts)
            matrix = Packed(piece.format, (rows, piece.shape[1]), *empty)
        for target, source in zip(matrix.parts, piece.parts, strict=True):
            if target is not None and source is not None:
                target[filled : filled + len(source)] = source
        filled += piece.shape[0]
    assert matrix is not None and filled == rows, f"{filled} of {rows} rows"
    return matrix


@dataclass(frozen=True)
class SafetensorsTensors(Tensors):
    """Tensors of a folder's safetensors files."""

    folder: Path
    names: dict[str, str]  # of the checkpoint's tensors, by their names in the slice
    files: dict[str, Path]  # by the checkpoint's names

    def read(self, name: str) -> tuple[Shape, Iterable[torch.Tensor]]:
        """Views of the tensor in the mapped file."""
        tensor = self._mapped(name)
        return tuple(tensor.shape), tensor.split(max(PIECE_VALUES // tensor.shape[-1], 1))

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor; where it has the dtype already, it stays in the mapped file."""
        return self._mapped(name).to(dtype)

    def _mapped(self, name: str) -> Any:
        inner = self.names[name]
        if inner not in self.files:
            raise InputError(f"{self.folder} lacks the tensor {inner}")
        try:
            with safe_open(self.files[inner], framework="pt") as stream:
                return stream.get_tensor(inner)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.files[inner]} cannot be read: {error}") from error


@dataclass(frozen=True)
class RandomTensors(Tensors):
    """Normal values about as large as trained ones, equal in every run; a norm's weight is one."""

    shapes: dict[str, torch.Size]

    def read(self, name: str) -> tuple[Shape, Iterator[torch.Tensor]]:
        """Draw a tensor."""
        return self.shapes[name], self._pieces(name)

    def _pieces(self, name: str) -> Iterator[torch.Tensor]:
        *rows, width = self.shapes[name]
        if not rows:
            yield torch.full((width,), float(name.endswith("norm.weight")))
            return
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for piece in torch.empty(rows[0]).split(max(PIECE_VALUES // width, 1)):
            yield torch.empty(len(piece), width).normal_(0.0, 0.02, generator=draw)
