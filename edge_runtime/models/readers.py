"""Where a model's tensors come from: safetensors files, a GGUF file, or random numbers.

A reader gives a tensor by its name in the model, dense in a dtype or packed in a block format.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from edge_kernels import Packed
from safetensors import SafetensorError, safe_open

from edge_runtime.errors import InputError
from edge_runtime.models import headers
from edge_runtime.models.facts import Facts
from edge_runtime.models.packed import PIECE_VALUES, join_rows, pack_matrix, pack_pieces

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # a block's number is the first number in a state_dict key


class Tensors(Protocol):
    """A model's tensors by their names in its state_dict."""

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor."""

    def packed(self, name: str, format: str) -> Packed:
        """One matrix."""


def open_tensors(facts: Facts, layers: tuple[int, ...], shapes: dict[str, torch.Size]) -> Tensors:
    """The tensors of a depth slice.

    Args:
        facts: of the checkpoint.
        layers: the slice's layers by their numbers in the checkpoint.
        shapes: of the slice's tensors, by name.

    Raises:
        InputError: a file is cut short or cannot be read.
    """
    if not facts.weights:
        return RandomTensors(shapes)
    path, names = Path(facts.weights), {name: _in_checkpoint(name, layers) for name in shapes}
    if path.suffix == ".gguf":
        from edge_runtime.models import gguf_file  # imports gguf

        headers.tensors(path)  # refuses a file that was cut short after it was prepared
        content = (Path(facts.folder) / "tensors.json").read_bytes()
        entries = msgspec.json.decode(content, type=dict[str, gguf_file.Tensor])
        # a tied head is not in the file
        held = {name: entries[inner] for name, inner in names.items() if inner in entries}
        return gguf_file.GGUFTensors(path, held)
    files = {name: file for file in headers.files(path) for name in headers.tensors(file)}
    return SafetensorsTensors(path, names, files)


def _in_checkpoint(name: str, layers: tuple[int, ...]) -> str:
    """A tensor's name in the checkpoint, of which the slice keeps these layers."""
    return LAYER.sub(lambda number: str(layers[int(number[0])]), name, count=1)


class SafetensorsTensors(NamedTuple):
    """Tensors of a folder's safetensors files."""

    folder: Path
    names: dict[str, str]  # of the checkpoint's tensors, by their names in the slice
    files: dict[str, Path]  # by the checkpoint's names

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor."""
        return self._read(name).to(dtype)

    def packed(self, name: str, format: str) -> Packed:
        """One matrix."""
        return pack_matrix(self._read(name), format)

    def _read(self, name: str) -> Any:
        inner = self.names[name]
        if inner not in self.files:
            raise InputError(f"{self.folder} lacks the tensor {inner}")
        try:
            with safe_open(self.files[inner], framework="pt") as stream:
                return stream.get_tensor(inner)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.files[inner]} cannot be read: {error}") from error


class RandomTensors(NamedTuple):
    """Normal values about as large as trained ones, equal in every run; a norm's weight is one."""

    shapes: dict[str, torch.Size]

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor."""
        return join_rows(self._pieces(name), self.shapes[name], dtype)

    def packed(self, name: str, format: str) -> Packed:
        """One matrix."""
        if format == "nf4":
            return pack_matrix(self.dense(name, torch.float32), format)
        return pack_pieces(self._pieces(name), format, self.shapes[name][0])

    def _pieces(self, name: str) -> Iterator[torch.Tensor]:
        *rows, width = self.shapes[name]
        if not rows:
            yield torch.full((width,), float(name.endswith("norm.weight")))
            return
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for piece in torch.empty(rows[0]).split(max(PIECE_VALUES // width, 1)):
            yield torch.empty(len(piece), width).normal_(0.0, 0.02, generator=draw)
