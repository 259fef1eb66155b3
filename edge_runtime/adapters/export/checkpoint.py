"""Writes a base model as a folder in Hugging Face's layout: the layers of a slice, with an adapter merged or not.

    config.json, generation_config.json, tokenizer files
    model.safetensors    each tensor in the configuration's dtype; of a packed base in bfloat16
                         W + B A in place of W where the adapter is merged

Tensors are read, added to and written a few rows at a time, so a matrix is never whole in memory.
Layers are numbered from 0. Source of the file's format: safetensors' README.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from edge_runtime.adapters.learned import Array, Learned, module
from edge_runtime.compat.empty_model import empty_model
from edge_runtime.models import weights
from edge_runtime.models.families import family_of

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# of a prepared model's folder: every other file is the tokenizer's
PREPARED = ("config.json", "facts.json", "tensors.json")
Factors: TypeAlias = Mapping[str, tuple[Array, Array]]  # A and B by the tensor's name


def write(learned: Learned, folder: Path, *, merged: bool) -> None:
    """Write the folder.

    Args:
        learned: its facts have the base at hand.
        merged: add the adapter's products to the weights.

    Raises:
        InputError: a tensor of the base is missing, or a file is cut short.
    """
    facts = learned.facts
    config = weights.configuration(facts, learned.layers)
    if getattr(config, "quantization_config", None):  # what is written is expanded
        del config.quantization_config
    is_packed = Path(facts.weights).suffix == ".gguf"
    dtype = torch.bfloat16 if is_packed or config.dtype not in CODES else config.dtype
    config.dtype = dtype
    folder.mkdir(parents=True)
    copy_tokenizer(learned, folder)
    generation = Path(facts.weights) / "generation_config.json"
    if generation.exists():
        shutil.copy(generation, folder)
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    if facts.tied_head:
        shapes.pop("lm_head.weight", None)
    tensors = weights.open_tensors(facts, learned.layers, shapes)
    factors: Factors = {
        f"{module(facts, learned.layers.index(layer), role)}.weight": pair
        for (layer, role), pair in learned.factors.items()
        if merged
    }
    transposed = family_of(facts.family).transposed
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(_header(shapes, dtype))
        for name in shapes:
            first = 0
            for piece in tensors.read(name)[1]:
                rows = slice(first, first := first + len(piece))
                if name in factors:
                    piece = piece.float() + product(factors[name], rows, transposed=transposed)
                stream.write(piece.to(dtype).contiguous().view(torch.uint8).numpy().data)


def copy_tokenizer(learned: Learned, folder: Path) -> None:
    """Copy the tokenizer's files into a folder."""
    for file in Path(learned.facts.folder).iterdir():
        if file.is_file() and file.name not in PREPARED:
            shutil.copy(file, folder)


def _header(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> bytes:
    entries, end = {}, 0
    for name, shape in shapes.items():
        first, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header


def product(factors: tuple[Array, Array], rows: slice, *, transposed: bool = False) -> torch.Tensor:
    """Rows of B A (out, in), or of its transpose."""
    A, B = map(torch.from_numpy, factors)
    return A.T[rows] @ B.T if transposed else B[rows] @ A
