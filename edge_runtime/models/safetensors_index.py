"""Finds each tensor of a model in a folder's safetensors files, and accounts for all that they hold.

A tensor of the files is used, is the copy of a tied head, holds scales, belongs to a part that reads
images, or is known to be without effect; any other is refused by name. The names are transformers'
(compat/checkpoint_names.py). No weight is read, but for a tied head that is in the files too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from edge_runtime.compat.checkpoint_names import model_names, without_effect
from edge_runtime.compat.empty_model import empty_model
from edge_runtime.errors import InputError
from edge_runtime.models import headers, structure
from edge_runtime.models.headers import Place
from edge_runtime.models.quantised import (
    ORDER,
    FolderTensor,
    Quantisation,
    located,
    quantisation,
    without_weights,
)
from edge_runtime.models.readers import SafetensorsTensors

IMAGES = "of the part that reads images"  # in place of a tensor's name in the text model


class Held(NamedTuple):
    """What a folder's files hold."""

    folder: Path
    files: dict[str, Path]  # by the tensors' names
    places: dict[str, Place]
    quantised: Quantisation | None


class Tied(NamedTuple):
    """Two keys of a model's state_dict that are one tensor."""

    head: str
    embedding: str


def index(folder: Path, whole: Any, model: PreTrainedModel) -> dict[str, FolderTensor]:
    """How to read each tensor of a model's state_dict, by its key there.

    Where config.json ties the head to the embedding, the files may have either tensor or both:

        the embedding alone, or the head alone    tied; the tensor that is there is read as the embedding
        both, of equal values                     tied; the head's copy is not read
        both, of other values                     untied in the model's configuration, as transformers does

    Args:
        folder: in Hugging Face's layout.
        whole: the folder's configuration; that of the text model is a part of it.
        model: the text model, without memory.

    Raises:
        InputError: a tensor is missing, has another shape or a dtype that is not read; or the files
            hold a tensor that has no place in the model.
    """
    files = headers.files(folder)
    places = {name: place for file in set(files.values()) for name, place in headers.tensors(file).items()}
    held = Held(folder, files, places, quantisation(folder, getattr(whole, "quantization_config", None)))
    shapes = {key: tuple(parameter.shape) for key, parameter in model.state_dict().items()}
    targets = _targets(whole, model, list(places))
    sources = _sources(folder, targets, shapes)
    tied = _tied(model)
    if tied and tied.head in sources:
        sources.setdefault(tied.embedding, sources[tied.head])
    elif tied:
        del shapes[tied.head]
    tensors = {key: _located(held, key, sources, shape) for key, shape in shapes.items()}
    _refuse_others(held, targets, tensors, model)
    if tied and tied.head in tensors:
        if _differ(_reader(held, tensors), tied):
            model.config.tie_word_embeddings = False
        else:
            del tensors[tied.head]
    return tensors


def _targets(whole: Any, model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """The text model's name of each of the files' tensors, or IMAGES."""
    if whole.get_text_config() is whole:
        return model_names(model, names)
    outer = empty_model(whole)
    inside = {structure.path(outer, outer.get_decoder()): structure.path(model, model.get_decoder())}
    inside[structure.path(outer, outer.get_output_embeddings())] = structure.path(
        model, model.get_output_embeddings()
    )
    targets, keys = {}, outer.state_dict().keys()
    for name, target in model_names(outer, names).items():
        targets[name] = IMAGES if target in keys else target
        for before, after in inside.items():
            if target.startswith(f"{before}."):
                targets[name] = after + target.removeprefix(before)
    return targets


def _tied(model: PreTrainedModel) -> Tied | None:
    """The keys of head and embedding where the configuration says that they are one tensor."""
    if not model.config.tie_word_embeddings:
        return None
    modules = model.get_output_embeddings(), model.get_input_embeddings()
    return Tied(*(f"{structure.path(model, module)}.weight" for module in modules))


def _sources(folder: Path, targets: dict[str, str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """The files' name of each tensor that the model needs."""
    sources: dict[str, str] = {}
    for name, key in targets.items():
        if key in sources:
            raise InputError(f"{folder} has the tensor {key} twice, as {sources[key]} and as {name}")
        if key in shapes:
            sources[key] = name
    return sources


def _located(held: Held, key: str, sources: dict[str, str], needed: tuple[int, ...]) -> FolderTensor:
    """How to read a tensor, which the files have in the shape that the model needs."""
    if key not in sources:
        raise InputError(f"{held.folder} lacks the tensor {key}, which the model of its config.json needs")
    name = sources[key]
    if (seen := held.places[name].shape) != needed:
        raise InputError(
            f"{name} is {seen} in {held.folder}, but the model of its config.json needs {needed}: give the "
            "config.json that belongs to these weights"
        )
    return located(name, held.places, held.quantised)


def _refuse_others(
    held: Held, targets: dict[str, str], tensors: dict[str, FolderTensor], model: PreTrainedModel
) -> None:
    """Refuse what is not accounted for, and codes in an order that is not read."""
    used = {name for tensor in tensors.values() for name in (tensor.name, tensor.scales)}
    others = []
    for name, target in targets.items():
        if name in used or target == IMAGES or without_effect(model, target):
            continue
        if not without_weights(name, held.quantised):
            others.append(name)
        elif name.endswith(ORDER) and _reader(held, tensors).held(name).any():
            raise InputError(
                f"{name} in {held.folder} gives codes in another order than the matrix, which is not read"
            )
    if others:
        raise InputError(
            f"{held.folder} has {len(others)} tensors that have no place in the model of its config.json, such as "
            f"{others[0]}: give the config.json that belongs to these weights, or a checkpoint without them"
        )
    if structure.family(model).transposed and any(tensor.scales for tensor in tensors.values()):
        raise InputError(f"{held.folder} is quantised, which is not read for models of this family")


def _reader(held: Held, tensors: dict[str, FolderTensor]) -> SafetensorsTensors:
    return SafetensorsTensors(held.folder, tensors, held.files)


def _differ(tensors: SafetensorsTensors, tied: Tied) -> bool:
    pairs = zip(*(tensors.read(name)[1] for name in tied), strict=True)
    return not all(torch.equal(head.float(), embedding.float()) for head, embedding in pairs)
