"""Finds each tensor of a model in a folder's safetensors files, and accounts for all that they hold.

A tensor of the files is used, is the copy of a tied head, holds scales, belongs to a part that reads
images, or is known to be without effect; any other is refused by name. The names are transformers'
(compat/checkpoint_names.py). No weight is read, but for a tied head that is in the files too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from edge_runtime.compat.checkpoint_names import model_names, without_effect
from edge_runtime.compat.empty_model import empty_model
from edge_runtime.errors import InputError
from edge_runtime.models import headers, structure
from edge_runtime.models.headers import Place
from edge_runtime.models.quantised import FolderTensor, companions, located, quantisation
from edge_runtime.models.readers import SafetensorsTensors

IMAGES = "of the part that reads images"  # in place of a tensor's name in the text model


def index(folder: Path, whole: Any, model: PreTrainedModel) -> dict[str, FolderTensor]:
    """How to read each tensor of a model's state_dict, by its key there.

    A tied head whose tensor in the files differs from the embedding is untied in the model's
    configuration, as transformers does.

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
    quantised = quantisation(folder, whole)
    targets = _targets(whole, model, list(places))
    sources: dict[str, str] = {}
    for name, target in targets.items():
        if target in sources and target in model.state_dict():
            raise InputError(f"{folder} has the tensor {target} twice, as {sources[target]} and as {name}")
        sources[target] = name
    head, embedding = _tied(model)
    if head and embedding not in sources and head in sources:
        sources[embedding] = sources[head]
    tensors = {}
    for key, parameter in model.state_dict().items():
        if key == head and key not in sources:
            continue
        if key not in sources:
            raise InputError(f"{folder} lacks the tensor {key}, which the model of its config.json needs")
        tensors[key] = _checked(folder, sources[key], parameter, places, model, quantised)
    _refuse_others(folder, targets, tensors, model, quantised)
    if head in tensors and _differ(SafetensorsTensors(folder, tensors, files), head, embedding):
        model.config.tie_word_embeddings = False
    elif head:
        tensors.pop(head, None)
    return tensors


def _targets(whole: Any, model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """The text model's name of each of the files' tensors, or IMAGES."""
    if whole.get_text_config() is whole:
        return model_names(model, names)
    outer = empty_model(whole)
    inside = {_path(outer, outer.get_decoder()): _path(model, model.get_decoder())}
    inside[_path(outer, outer.get_output_embeddings())] = _path(model, model.get_output_embeddings())
    targets = {}
    for name, target in model_names(outer, names).items():
        targets[name] = IMAGES if target in outer.state_dict() else target
        for before, after in inside.items():
            if target.startswith(f"{before}."):
                targets[name] = after + target.removeprefix(before)
    return targets


def _path(model: PreTrainedModel, module: torch.nn.Module) -> str:
    return next(name for name, inner in model.named_modules() if inner is module)


def _tied(model: PreTrainedModel) -> tuple[str, str]:
    """The keys of head and embedding where they are one tensor, else empty."""
    if not model.config.tie_word_embeddings:
        return "", ""
    modules = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (f"{_path(model, module)}.weight" for module in modules)
    return head, embedding


def _checked(
    folder: Path,
    name: str,
    parameter: torch.Tensor,
    places: Mapping[str, Place],
    model: PreTrainedModel,
    quantised: Any,
) -> FolderTensor:
    """How to read a tensor of the files that has the parameter's shape."""
    seen, needed = places[name].shape, tuple(parameter.shape)
    if seen != needed:
        raise InputError(f"{name} is {seen} in {folder}, but the model of its config.json needs {needed}")
    tensor = located(name, places, quantised)
    if tensor.scales and structure.family(model).transposed:
        raise InputError(f"{name} in {folder} is quantised, which is not read for models of this family")
    return tensor


def _refuse_others(
    folder: Path,
    targets: dict[str, str],
    tensors: dict[str, FolderTensor],
    model: PreTrainedModel,
    quantised: Any,
) -> None:
    """Refuse tensors of the files that are not accounted for."""
    used = {tensor.name for tensor in tensors.values()}
    used |= {other for name in used for other in companions(name, quantised)}
    others = [
        name
        for name, target in targets.items()
        if name not in used and target != IMAGES and not without_effect(model, target)
    ]
    if others:
        raise InputError(
            f"{folder} has {len(others)} tensors that have no place in the model of its config.json, such as "
            f"{others[0]}: give the config.json that belongs to these weights, or a checkpoint without them"
        )


def _differ(tensors: SafetensorsTensors, head: str, embedding: str) -> bool:
    pairs = zip(tensors.read(head)[1], tensors.read(embedding)[1], strict=True)
    return not all(torch.equal(one.float(), two.float()) for one, two in pairs)
