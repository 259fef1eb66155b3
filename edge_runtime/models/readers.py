"""Sources of a model's tensors: safetensors files, a GGUF file (gguf_file.py), random numbers."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from edge_kernels import Packed, pack
from safetensors import SafetensorError, safe_open

from edge_runtime.errors import InputError
from edge_runtime.models.quantised import FolderTensor

PIECE_VALUES = 1 << 20  # read or packed at once
# limits of what rounding changes: of bfloat16, where 0.0017 was seen, and of 8 bits with scales, of
# which E5M2 has two for the fraction
FLOATS, SCALED = 2**-8, 2**-3
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

    def rounding(self, name: str) -> float:
        """How far a tensor may be from its model's, ‖rounded - exact‖ / ‖exact‖."""
        return FLOATS


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
    tensors: dict[str, FolderTensor]  # by the model's names
    files: dict[str, Path]  # by the files' names

    def read(self, name: str) -> tuple[Shape, Iterable[torch.Tensor]]:
        """Views of the tensor in the mapped file; a quantised matrix in float32."""
        tensor = self.tensors[name]
        held = self.held(tensor.name)
        pieces = held.split(max(PIECE_VALUES // held.shape[-1], 1))
        return tuple(held.shape), self._expanded(tensor, pieces, held.shape[-1]) if tensor.scales else pieces

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor; where it has the dtype already, it stays in the mapped file."""
        if self.tensors[name].scales:
            return super().dense(name, dtype)
        return self.held(self.tensors[name].name).to(dtype)

    def rounding(self, name: str) -> float:
        """The limit for floats, or for codes with scales."""
        return SCALED if self.tensors[name].scales else FLOATS

    def _expanded(
        self, tensor: FolderTensor, pieces: Iterable[torch.Tensor], width: int
    ) -> Iterator[torch.Tensor]:
        """Pieces of codes (rows, width), multiplied by the scales of their blocks."""
        (rows, columns), first = tensor.block, 0
        scales = (self.held(tensor.scales).float() * tensor.factor).view(-1, -(-width // columns))
        for codes in pieces:
            inside = scales[torch.arange(first, first + len(codes)) // rows]
            yield codes.float() * inside.repeat_interleave(columns, 1)[:, :width]
            first += len(codes)

    def held(self, name: str) -> torch.Tensor:
        """A tensor of the mapped files, by its name there, as it is held."""
        if name not in self.files:
            raise InputError(f"{self.folder} lacks the tensor {name}")
        try:
            with safe_open(self.files[name], framework="pt") as stream:
                tensor: torch.Tensor = stream.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.files[name]} cannot be read: {error}") from error


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
