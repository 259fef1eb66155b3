"""Reads base weights out of a GGUF file: an index of its tensors made once, then tensor by tensor, a few rows at a time.

The names and the block formats are the `gguf` package's. Two conversions of llama.cpp have to be undone: Llama's query and
key rows are interleaved for its rotary kernel, and Gemma's norm weights have 1 added.
Source: llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute, GemmaModel.modify_tensors).
"""

from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch

from edge_runtime.errors import InputError

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}  # where GGUF's name differs from the configuration's
SUPPORTED = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
PIECE_BYTES = 4 << 20  # of float32 expanded at once


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
        InputError: an architecture that is not in SUPPORTED, a missing tensor, or a file cut short (named with its bytes).
    """
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    if architecture not in SUPPORTED:
        raise InputError(f"{path}: GGUF files of {architecture} are not supported; known: {', '.join(SUPPORTED)}")
    number = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    gguf_names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    size = path.stat().st_size
    found = {}
    for name in names:
        inner = gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        if inner not in held:
            raise InputError(f"{path} lacks the tensor {inner or name}")
        tensor = held[inner]
        if tensor.data_offset + tensor.n_bytes > size:
            raise InputError(f"{path} ends at byte {size}, but {inner} goes to {tensor.data_offset + tensor.n_bytes}")
        heads = 0
        if architecture == "llama" and ".attn_q." in inner:
            heads = config.num_attention_heads
        elif architecture == "llama" and ".attn_k." in inner:
            heads = config.num_key_value_heads
        added = 1.0 if architecture.startswith("gemma") and inner.endswith("norm.weight") else 0.0
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[name] = Tensor(int(tensor.data_offset), int(tensor.tensor_type), shape, heads, added)
    return found


def read(path: Path, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One tensor in the given dtype; besides the result, at most PIECE_BYTES are expanded at a time."""
    kind = gguf.GGMLQuantizationType(tensor.kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = tensor.shape[-1]
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    row_bytes = columns // block * block_bytes
    out = torch.empty((rows, columns), dtype=dtype)
    step = max(PIECE_BYTES // (4 * columns), 1)
    with path.open("rb") as stream:
        stream.seek(tensor.offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            packed = np.frombuffer(stream.read(count * row_bytes), dtype=np.uint8)
            if packed.size != count * row_bytes:
                raise InputError(f"{path} is cut short: {count * row_bytes - packed.size} bytes are missing")
            values = gguf.quants.dequantize(packed.reshape(count, row_bytes), kind).astype(np.float32, copy=False)
            out[first : first + count] = torch.from_numpy(values - np.float32(tensor.added))
    if tensor.interleaved_heads:
        half = tensor.shape[0] // tensor.interleaved_heads // 2
        out = out.view(tensor.interleaved_heads, half, 2, -1).transpose(1, 2).reshape(tensor.shape)
    return out.view(tensor.shape)
