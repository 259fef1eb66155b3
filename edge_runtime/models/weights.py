"""Loads a base model, or a depth slice of it, tensor by tensor; dropped layers are never read.

Peak while loading: the model in its final format and a piece of one tensor (readers.PIECE_VALUES);
in nf4 the model and one matrix in float32. A model whose blocks are streamed takes the memory of
embedding, head and a block.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from edge_kernels import Packed
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edge_runtime.compat.empty_model import empty_model
from edge_runtime.errors import InputError
from edge_runtime.models import headers, structure
from edge_runtime.models.facts import Facts
from edge_runtime.models.packed import DTYPE, EMBEDDING, PackedEmbedding, PackedLinear, stream
from edge_runtime.models.quantised import FolderTensor
from edge_runtime.models.readers import RandomTensors, SafetensorsTensors, Tensors
from edge_runtime.models.slices import kept_layers
from edge_runtime.settings import PACKED, Weights

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # a block's number is the first number in a state_dict key


def load(
    facts: Facts, depth: int, weights: Weights, device: str = "cpu", *, streamed: bool = False
) -> PreTrainedModel:
    """The frozen base model of a plan, in evaluation mode.

    Args:
        facts: of the checkpoint.
        depth: layers to keep (`kept_layers`); the model numbers them 0 to depth - 1.
        weights: format of the base; with a packed format the activations are bfloat16.
        device: "cpu" or "cuda".
        streamed: leave the blocks' packed matrices in files beside the facts (`stream`). Blocks of
            another format are read from the checkpoint each time they run, tensor by tensor.

    Raises:
        InputError: a tensor is missing or has another size, a file is cut short, or the family
            cannot be packed. A file that is cut short is refused before any weight is read.
    """
    transformers_logging.disable_progress_bar()
    layers = kept_layers(depth, facts.layers)
    config = configuration(facts, layers)
    config.get_text_config().use_cache = False
    # a model without memory, and the tensors that it lacks
    model = empty_model(config)
    tensors = open_tensors(facts, layers, {name: tensor.shape for name, tensor in model.state_dict().items()})
    if weights in PACKED:  # before _fill: modules that packed matrices replace are not filled
        folder = Path(facts.folder) / f"streamed-{weights}"
        files = [folder / f"{layer}.safetensors" if streamed else None for layer in layers]
        _pack(model, tensors, weights, device, files)
        _fill(model, facts, tensors, DTYPE, device)
    else:
        dtype, blocks = getattr(torch, weights), structure.blocks(model)
        for block in blocks if streamed else ():
            _read_while_it_runs(model, block, partial(_read, facts, tensors, dtype, device), device)
        _fill(model, facts, tensors, dtype, device, f"{structure.path(model, blocks)}." if streamed else None)
        model.tie_weights()  # the head, which _fill left out
    model.to(device)  # rotary frequencies, which are in no file
    return model.eval().requires_grad_(False)


def configuration(facts: Facts, layers: tuple[int, ...]) -> Any:
    """The transformers configuration of a slice that keeps these layers."""
    config = AutoConfig.from_pretrained(facts.folder, trust_remote_code=False)
    text = config.get_text_config()
    if len(layers) < facts.layers and getattr(text, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(
            f"attention in {facts.model_class} depends on a layer's number (scale_attn_by_inverse_layer_idx), "
            "which a slice would change: give the whole model's depth"
        )
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in layers]
    return config


def open_tensors(facts: Facts, layers: tuple[int, ...], shapes: dict[str, torch.Size]) -> Tensors:
    """The tensors of a slice that keeps these layers. shapes: by tensors' names in the slice."""
    if not facts.weights:
        return RandomTensors(shapes)
    path = Path(facts.weights)
    names = {name: LAYER.sub(lambda number: str(layers[int(number[0])]), name, count=1) for name in shapes}
    content = (Path(facts.folder) / "tensors.json").read_bytes()
    if path.suffix != ".gguf":
        places = msgspec.json.decode(content, type=dict[str, FolderTensor])
        # a tied head is not in the index
        inside = {name: places[inner] for name, inner in names.items() if inner in places}
        return SafetensorsTensors(path, inside, headers.files(path))
    from edge_runtime.models import gguf_file, gguf_header  # import gguf

    contents = gguf_header.read(path, values=False)  # refuses a file that is cut short
    entries = msgspec.json.decode(content, type=dict[str, gguf_file.Tensor])
    return gguf_file.GGUFTensors(
        contents.files, {name: entries[inner] for name, inner in names.items() if inner in entries}
    )


def _fill(
    model: PreTrainedModel,
    facts: Facts,
    tensors: Tensors,
    dtype: torch.dtype,
    device: str,
    but: str | None = None,
) -> None:
    """Read every parameter that the model still lacks, but for a tied head and those of this prefix."""
    for name, parameter in list(model.named_parameters()):
        if (facts.tied_head and name == "lm_head.weight") or (but and name.startswith(but)):
            continue
        module, _, attribute = name.rpartition(".")
        filled = _read(facts, tensors, dtype, device, name, parameter.shape)
        setattr(model.get_submodule(module), attribute, filled)


def _read(
    facts: Facts, tensors: Tensors, dtype: torch.dtype, device: str, name: str, shape: torch.Size
) -> nn.Parameter:
    values = tensors.dense(name, dtype)
    if values.numel() != shape.numel():
        raise InputError(
            f"{name} is {tuple(values.shape)} in {facts.weights}, but this model needs {tuple(shape)}"
        )
    return nn.Parameter(values.view(shape).to(device), requires_grad=False)


def _read_while_it_runs(
    model: PreTrainedModel, block: nn.Module, read: Callable[[str, torch.Size], nn.Parameter], device: str
) -> None:
    """Make a block read its parameters each time it runs; else they have shapes and no memory."""
    prefix, slots = structure.path(model, block), []
    for name, parameter in list(block.named_parameters()):
        module, _, attribute = name.rpartition(".")
        empty = nn.Parameter(torch.zeros(1, device=device).expand(parameter.shape), requires_grad=False)
        slots.append((block.get_submodule(module), attribute, f"{prefix}.{name}", empty))

    def empty_again() -> None:
        for owner, attribute, _, empty in slots:
            setattr(owner, attribute, empty)

    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        for owner, attribute, name, empty in slots:
            setattr(owner, attribute, read(name, empty.shape))
        try:
            return forward(*args, **kwargs)
        finally:
            empty_again()

    empty_again()
    block.forward = run


def _pack(
    model: PreTrainedModel, tensors: Tensors, format: Any, device: str, files: Sequence[Path | None]
) -> None:
    """Put packed matrices in place of embedding, head and the linear layers of the blocks.

    files: for each block where its matrices stay; None: in memory.
    """
    row, blocks = structure.family(model), structure.blocks(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}  # before any module is replaced
    for layer in [*structure.linears(blocks[0], row).values(), head]:
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"{names[layer]} is a {type(layer).__name__}: models of this family cannot be packed"
            )

    def replace(layer: Any, matrix: Packed) -> None:
        bias = None if layer.bias is None else tensors.dense(f"{names[layer]}.bias", DTYPE).to(device)
        model.set_submodule(names[layer], PackedLinear(matrix, bias))

    # embedding and head, which are one matrix where they are tied
    table = tensors.packed(f"{names[embedding]}.weight", EMBEDDING).to(device)
    factor = float(getattr(embedding, "scalar_embed_scale", 1.0))
    model.set_submodule(names[embedding], PackedEmbedding(table, factor))
    if not model.config.get_text_config().tie_word_embeddings:
        table = tensors.packed(f"{names[head]}.weight", EMBEDDING).to(device)
    replace(head, table)
    # the blocks
    for block, file in zip(blocks, files, strict=True):
        reads = {}
        for role, layer in structure.linears(block, row).items():
            read = partial(tensors.packed, f"{names[layer]}.weight", format)
            reads[row.linears[role]] = read
            if file is None:
                replace(layer, read().to(device))
            else:
                empty = torch.empty(0, device=device)
                replace(layer, Packed(format, tuple(layer.weight.shape), empty, empty))
        if file is not None:
            stream(block, reads, file, device)
