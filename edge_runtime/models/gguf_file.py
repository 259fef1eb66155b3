"""Reads base weights out of a GGUF file: an index of its tensors made once, then tensor by tensor, a few rows at a time.

The names and the block formats are the `gguf` package's. Two conversions of llama.cpp have to be undone: Llama's query and
key rows are interleaved for its rotary kernel, and Gemma's norm weights have 1 added.
Source: llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute, GemmaModel.modify_tensors).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
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
from edge_runtime.models import whole
from edge_runtime.models.packed import join_pieces, pack_pieces

ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
}  # where GGUF's name differs from the configuration's
SUPPORTED = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
PIECE_BYTES = 4 << 20  # read at once, as float32


class Tensor(msgspec.Struct, frozen=True):
    """Where one tensor lies. shape: as torch has it. interleaved_heads: 0, or the heads whose rows are interleaved."""

    offset: int
    kind: int
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    added: float = 0.0


def index(path: Path, names: list[str], config: Any) -> dict[str, Tensor]:
    """Find the tensors of a model in a GGUF file.

    Args:
        names: the model's state_dict keys.
        config: its transformers configuration.

    Raises:
        InputError: an architecture that is not in SUPPORTED, a missing tensor, or one in a format that cannot be expanded.
    """
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    if architecture not in SUPPORTED:
        raise InputError(
            f"{path}: GGUF files of {architecture} are not supported; known: {', '.join(SUPPORTED)}"
        )
    number = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    gguf_names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    held = whole.tensors(path)
    found = {}
    for name in names:
        inner = gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        if inner not in held:
            raise InputError(f"{path} lacks the tensor {inner or name}")
        tensor = held[inner]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        if not _expandable(kind):
            raise InputError(f"{path}: {inner} is held in {kind.name}, which cannot be expanded to numbers")
        heads = 0
        if architecture == "llama" and ".attn_q." in inner:
            heads = config.num_attention_heads
        elif architecture == "llama" and ".attn_k." in inner:
            heads = config.num_key_value_heads
        added = 1.0 if architecture.startswith("gemma") and inner.endswith("norm.weight") else 0.0
        found[name] = Tensor(tensor.first, tensor.kind, tensor.shape, heads, added)
    return found


class _PlainReader(gguf.GGUFReader):
    """Keeps plain arrays of a file's parts. Those of a memory map take a kilobyte each, and there are four for each token."""

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._data = np.asarray(mapped)


@contextmanager
def plain_reader() -> Iterator[None]:
    """While inside, transformers reads GGUF files in half the memory: 620 MiB in place of 970 for Gemma's 262,144 tokens."""
    usual = gguf.GGUFReader
    gguf.GGUFReader = _PlainReader
    try:
        yield
    finally:
        gguf.GGUFReader = usual


@functools.cache
def _expandable(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the `gguf` package expands blocks of this kind; it says so only when it is asked for one."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class Reader(NamedTuple):
    """Tensors of a GGUF file by the model's own names."""

    path: Path
    tensors: dict[str, Tensor]

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor in the given dtype; besides the result, at most PIECE_BYTES are expanded at a time."""
        tensor = self.tensors[name]
        out = torch.empty((_rows(tensor), tensor.shape[-1]), dtype=dtype)
        first = 0
        for values in _expanded(self.path, tensor):
            out[first : first + len(values)] = values
            first += len(values)
        out, order = out.view(tensor.shape), _order(tensor)
        return out if order is None else out[order]

    def packed(self, name: str, format: str) -> Packed:
        """One matrix in a block format: as it is where the file has it so, else expanded and packed some rows at a time."""
        if format == "nf4":  # its scales are quantised together
            return pack(self.dense(name, torch.float32), "nf4")
        tensor = self.tensors[name]
        if gguf.GGMLQuantizationType(tensor.kind).name.lower() == format:
            taken = (
                from_gguf(torch.from_numpy(held), format, (len(held), tensor.shape[-1]))  # type: ignore[arg-type]
                for held in _blocks(self.path, tensor)
            )
            weight = join_pieces(taken, _rows(tensor))
        else:
            weight = pack_pieces(_expanded(self.path, tensor), format, _rows(tensor))
        order = _order(tensor)
        return weight if order is None else weight.rows(order)


def _expanded(path: Path, tensor: Tensor) -> Iterator[torch.Tensor]:
    """The rows in float32, some at a time."""
    for held in _blocks(path, tensor):
        values = gguf.quants.dequantize(held, gguf.GGMLQuantizationType(tensor.kind)).astype(
            np.float32, copy=False
        )
        yield torch.from_numpy(values - np.float32(tensor.added))


def _blocks(path: Path, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """The rows as they lie in the file, (some, bytes of a row)."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    rows, step = _rows(tensor), max(PIECE_BYTES // (4 * tensor.shape[-1]), 1)
    row_bytes = tensor.shape[-1] // block * block_bytes
    with path.open("rb") as stream:
        stream.seek(tensor.offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            held = np.fromfile(stream, np.uint8, count * row_bytes)
            if held.size != count * row_bytes:
                raise InputError(f"{path} is cut short: {count * row_bytes - held.size} bytes are missing")
            yield held.reshape(count, row_bytes)


def _rows(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape[:-1], dtype=np.int64))


def _order(tensor: Tensor) -> torch.Tensor | None:
    """Where each row of a tensor with interleaved heads lies in the file."""
    heads = tensor.interleaved_heads
    return torch.arange(tensor.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten() if heads else None
