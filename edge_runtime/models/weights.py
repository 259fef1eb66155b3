"""Loads a base model, or a depth slice of it, tensor by tensor: layers that a slice drops are never read.

Peak while loading: the model in its final format plus one tensor's piece (see gguf_file); in nf4 plus a matrix in float32.
"""

import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from edge_kernels import Packed
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from edge_runtime.errors import InputError
from edge_runtime.models import families as roles
from edge_runtime.models import stream, whole
from edge_runtime.models.facts import Facts
from edge_runtime.models.packed import (
    EMBEDDING,
    PIECE_VALUES,
    PackedEmbedding,
    PackedLinear,
    pack_matrix,
    pack_pieces,
)
from edge_runtime.models.slices import kept_layers
from edge_runtime.settings import PACKED, Weights

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the block's number is the first number in a state_dict key


def load(
    facts: Facts, depth: int, weights: Weights, device: str = "cpu", *, streamed: bool = False
) -> PreTrainedModel:
    """The frozen base model of a plan, in evaluation mode.

    Args:
        facts: of the checkpoint.
        depth: layers to keep, chosen by `kept_layers`; the model numbers them 0 to depth - 1.
        weights: the format the base is held in. In a packed one its activations are bfloat16.
        streamed: leave the blocks' matrices, which are packed then, in files beside the facts (see `stream`).

    Raises:
        InputError: a tensor is missing, a file is cut short, or the family cannot be packed; it is named. What is cut short
            is refused before any weight is read.
    """
    transformers_logging.disable_progress_bar()
    kept = kept_layers(depth, facts.layers)
    config = AutoConfig.from_pretrained(facts.folder)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in kept]
    text.use_cache = False
    dtype = torch.bfloat16 if weights in PACKED else getattr(torch, weights)
    model = empty(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    read: _Reader = _Numbered(_reader(facts), kept) if facts.weights else _Random(shapes)
    if weights in PACKED:
        files = [Path(facts.folder) / f"streamed-{weights}" / f"{layer}.safetensors" for layer in kept]
        _pack(model, read, dtype, weights, device, files if streamed else [])
    for name, parameter in list(model.named_parameters()):
        if facts.tied_head and name == "lm_head.weight":
            continue
        owner, _, own = name.rpartition(".")
        filled = read.dense(name, dtype)
        if filled.numel() != parameter.numel():
            needed = tuple(parameter.shape)
            raise InputError(
                f"{name} is {tuple(filled.shape)} in {facts.weights}, but this model needs {needed}"
            )
        filled = filled.view(parameter.shape).to(device)
        setattr(model.get_submodule(owner), own, nn.Parameter(filled, requires_grad=False))
    if weights not in PACKED:
        model.tie_weights()  # the head above
    model.to(device)  # rotary frequencies, which are in no file
    return model.eval().requires_grad_(False)


def empty(config: Any) -> PreTrainedModel:
    """The model of a configuration; its tensors take no memory."""
    with _WithoutMemory(), no_init_weights():
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


class _WithoutMemory(TorchFunctionMode):
    """What is made empty, to be filled, takes no memory; torch's own device for that brings its compiler, 80 MiB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **((kwargs or {}) | ({"device": "meta"} if func is torch.empty else {})))


class _Reader(Protocol):
    """A file of weights."""

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor: ...
    def packed(self, name: str, format: str) -> Packed: ...


class _Numbered(NamedTuple):
    """Reads a slice's tensors by the names they have in the slice."""

    reader: _Reader
    kept: tuple[int, ...]

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.reader.dense(self._whole(name), dtype)

    def packed(self, name: str, format: str) -> Packed:
        return self.reader.packed(self._whole(name), format)

    def _whole(self, name: str) -> str:
        return LAYER.sub(lambda number: str(self.kept[int(number[0])]), name, count=1)


def _pack(
    model: PreTrainedModel, read: _Reader, dtype: torch.dtype, format: str, device: str, files: list[Path]
) -> None:
    """Put packed matrices into a model without memory. files: one for each block's matrices, or none."""
    places = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = read.packed(f"{places[embedding]}.weight", EMBEDDING).to(device)
    factor = float(getattr(embedding, "scalar_embed_scale", 1.0))
    model.set_submodule(places[embedding], PackedEmbedding(table, dtype, factor))
    tied = model.config.get_text_config().tie_word_embeddings

    linears = [list(roles.linears(block).values()) for block in roles.blocks(model)]
    layers = [
        layer
        for block, paths in zip(roles.blocks(model), linears, strict=True)
        for layer in map(block.get_submodule, paths)
    ]
    for layer in [*layers, head]:
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"{places[layer]} is a {type(layer).__name__}: models of this family cannot be packed"
            )

    def place(layer: nn.Module, weight: Packed) -> None:
        bias = None if layer.bias is None else read.dense(f"{places[layer]}.bias", dtype).to(device)
        model.set_submodule(places[layer], PackedLinear(weight, bias))

    place(head, table if tied else read.packed(f"{places[head]}.weight", EMBEDDING).to(device))
    for number, (block, paths) in enumerate(zip(roles.blocks(model), linears, strict=True)):
        names = {path: places[block.get_submodule(path)] for path in paths}
        for path, name in names.items():
            shape = tuple(block.get_submodule(path).weight.shape)
            held = (
                stream.empty(format, shape, device)
                if files
                else read.packed(f"{name}.weight", format).to(device)
            )
            place(block.get_submodule(path), held)
        if files:
            read_all = {path: partial(read.packed, f"{name}.weight", format) for path, name in names.items()}
            stream.stream(block, read_all, files[number], device)


def _reader(facts: Facts) -> _Reader:
    path = Path(facts.weights)
    if path.suffix == ".gguf":
        from edge_runtime.models import gguf_file

        whole.tensors(path)
        content = (Path(facts.folder) / "tensors.json").read_bytes()
        return gguf_file.Reader(path, msgspec.json.decode(content, type=dict[str, gguf_file.Tensor]))
    return _Safetensors(path, {name: file for file in whole.files(path) for name in whole.tensors(file)})


class _Safetensors(NamedTuple):
    path: Path
    files: dict[str, Path]

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._read(name).to(dtype)

    def packed(self, name: str, format: str) -> Packed:
        return pack_matrix(self._read(name), format)

    def _read(self, name: str) -> Any:
        if name not in self.files:
            raise InputError(f"{self.path} lacks the tensor {name}")
        try:
            with safe_open(self.files[name], framework="pt") as stream:
                return stream.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.files[name]} cannot be read: {error}") from error


class _Random(NamedTuple):
    """Normal values about as large as trained ones, the same in every run; ones where a norm has its scale."""

    shapes: dict[str, torch.Size]

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        values, filled = torch.empty(self.shapes[name], dtype=dtype), 0
        for piece in self._pieces(name):
            values.view(-1)[filled : filled + piece.numel()] = piece.view(-1)
            filled += piece.numel()
        return values

    def packed(self, name: str, format: str) -> Packed:
        return (
            pack_pieces(self._pieces(name), format, self.shapes[name][0])
            if format != "nf4"
            else pack_matrix(self.dense(name, torch.float32), format)
        )

    def _pieces(self, name: str) -> Iterator[torch.Tensor]:
        *rows, width = self.shapes[name]
        if not rows:
            yield torch.full((width,), float(name.endswith("norm.weight")))
            return
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for piece in torch.empty(rows[0]).split(max(PIECE_VALUES // width, 1)):
            yield torch.empty(len(piece), width).normal_(0.0, 0.02, generator=draw)
