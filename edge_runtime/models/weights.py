"""Loads a base model, or a depth slice of it, tensor by tensor; dropped layers are never read.

Peak while loading: the model in its final format and a piece of one tensor (gguf_file.PIECE_BYTES);
in nf4 the model and one matrix in float32.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from edge_kernels import Packed
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edge_runtime.compat.empty_model import empty_model
from edge_runtime.errors import InputError
from edge_runtime.models import structure
from edge_runtime.models.facts import Facts
from edge_runtime.models.packed import EMBEDDING, PackedEmbedding, PackedLinear
from edge_runtime.models.readers import Tensors, open_tensors
from edge_runtime.models.slices import kept_layers
from edge_runtime.models.stream import placeholder, stream
from edge_runtime.settings import PACKED, Weights


def load(
    facts: Facts, depth: int, weights: Weights, device: str = "cpu", *, streamed: bool = False
) -> PreTrainedModel:
    """The frozen base model of a plan, in evaluation mode.

    Args:
        facts: of the checkpoint.
        depth: layers to keep (`kept_layers`); the model numbers them 0 to depth - 1.
        weights: format of the base; with a packed format the activations are bfloat16.
        device: "cpu" or "cuda".
        streamed: leave the matrices of the blocks, packed, in files beside the facts (`stream`).

    Raises:
        InputError: a tensor is missing or has another size, a file is cut short, or the family
            cannot be packed. A file that is cut short is refused before any weight is read.
    """
    transformers_logging.disable_progress_bar()
    # the slice's configuration
    layers = kept_layers(depth, facts.layers)
    config = AutoConfig.from_pretrained(facts.folder)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in layers]
    text.use_cache = False
    dtype = torch.bfloat16 if weights in PACKED else getattr(torch, weights)
    # a model without memory, and the tensors that it lacks
    model = empty_model(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = open_tensors(facts, layers, shapes)
    # packed matrices first: what they replace is not filled
    if weights in PACKED:
        target = _Target(model, {module: name for name, module in model.named_modules()}, dtype, device)
        _refuse_unpackable(target)
        _pack_ends(target, tensors)
        for layer, block in zip(layers, structure.blocks(model), strict=True):
            file = Path(facts.folder) / f"streamed-{weights}" / f"{layer}.safetensors"
            _pack_block(target, tensors, block, weights, file if streamed else None)
    _fill(model, facts, tensors, dtype, device)
    if weights not in PACKED:
        model.tie_weights()  # the head, which _fill left out
    model.to(device)  # rotary frequencies, which are in no file
    return model.eval().requires_grad_(False)


def _fill(model: PreTrainedModel, facts: Facts, tensors: Tensors, dtype: torch.dtype, device: str) -> None:
    """Read every parameter that the model still lacks, but for a tied head."""
    for name, parameter in list(model.named_parameters()):
        if facts.tied_head and name == "lm_head.weight":
            continue
        values = tensors.dense(name, dtype)
        if values.numel() != parameter.numel():
            needed = tuple(parameter.shape)
            raise InputError(
                f"{name} is {tuple(values.shape)} in {facts.weights}, but this model needs {needed}"
            )
        filled = nn.Parameter(values.view(parameter.shape).to(device), requires_grad=False)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, filled)


# --- packed


class _Target(NamedTuple):
    """A model without memory, into which packed matrices are put."""

    model: PreTrainedModel
    names: dict[nn.Module, str]  # paths of its modules before any was replaced
    dtype: torch.dtype  # of activations and biases
    device: str


def _refuse_unpackable(target: _Target) -> None:
    row, blocks = structure.family(target.model), structure.blocks(target.model)
    for layer in [*structure.linears(blocks[0], row).values(), target.model.get_output_embeddings()]:
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"{target.names[layer]} is a {type(layer).__name__}: models of this family cannot be packed"
            )


def _pack_ends(target: _Target, tensors: Tensors) -> None:
    """The embedding and the head, which are one matrix where they are tied."""
    model, names = target.model, target.names
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = tensors.packed(f"{names[embedding]}.weight", EMBEDDING).to(target.device)
    factor = float(getattr(embedding, "scalar_embed_scale", 1.0))
    model.set_submodule(names[embedding], PackedEmbedding(table, target.dtype, factor))
    if not model.config.get_text_config().tie_word_embeddings:
        table = tensors.packed(f"{names[head]}.weight", EMBEDDING).to(target.device)
    _replace(target, tensors, head, table)


def _pack_block(target: _Target, tensors: Tensors, block: nn.Module, format: str, file: Path | None) -> None:
    """The linear layers of a block. file: where its matrices stay; None: in memory."""
    row = structure.family(target.model)
    layers = structure.linears(block, row)
    reads = {
        row.linears[role]: partial(tensors.packed, f"{target.names[layer]}.weight", format)
        for role, layer in layers.items()
    }
    for role, layer in layers.items():
        if file is None:
            matrix = reads[row.linears[role]]().to(target.device)
        else:
            matrix = placeholder(format, tuple(layer.weight.shape), target.device)
        _replace(target, tensors, layer, matrix)
    if file is not None:
        stream(block, reads, file, target.device)


def _replace(target: _Target, tensors: Tensors, layer: nn.Module, matrix: Packed) -> None:
    name, bias = target.names[layer], None
    if layer.bias is not None:
        bias = tensors.dense(f"{name}.bias", target.dtype).to(target.device)
    target.model.set_submodule(name, PackedLinear(matrix, bias))
