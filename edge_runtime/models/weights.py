"""Loads a base model, or a depth slice of it, tensor by tensor: layers that a slice drops are never read.

Peak while loading: the model in its final format plus one tensor's piece (see gguf_file).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edge_runtime.errors import InputError
from edge_runtime.models import gguf_file
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.settings import Weights

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the block's number is the first number in a state_dict key


def load(facts: Facts, depth: int, weights: Weights, device: str = "cpu") -> PreTrainedModel:
    """The frozen base model of a plan, in evaluation mode.

    Args:
        facts: of the checkpoint.
        depth: layers to keep, chosen by `kept_layers`; the model numbers them 0 to depth - 1.
        weights: the format the base is held in.

    Raises:
        InputError: a tensor is missing or cut short; it is named.
    """
    transformers_logging.disable_progress_bar()
    kept = kept_layers(depth, facts.layers)
    config = AutoConfig.from_pretrained(facts.folder)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in kept]
    text.use_cache = False
    dtype = getattr(torch, weights)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        names = list(kind(config).state_dict())
    read = _reader(facts, dtype)
    tensors = {
        name: read(LAYER.sub(lambda number: str(kept[int(number[0])]), name, count=1)).to(device)
        for name in names
        if not (facts.tied_head and name == "lm_head.weight")
    }
    model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def _reader(facts: Facts, dtype: torch.dtype) -> Callable[[str], torch.Tensor]:
    path = Path(facts.weights)
    if path.suffix == ".gguf":
        index = msgspec.json.decode(
            (Path(facts.folder) / "tensors.json").read_bytes(), type=dict[str, gguf_file.Tensor]
        )
        return lambda name: gguf_file.read(path, index[name], dtype)

    def read(name: str) -> torch.Tensor:
        if name not in files:
            raise InputError(f"{path} lacks the tensor {name}")
        try:
            with safe_open(files[name], framework="pt") as stream:
                return stream.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{files[name]} cannot be read: {error}") from error

    files = _safetensors_files(path)
    return read


def _safetensors_files(folder: Path) -> dict[str, Path]:
    listing = folder / "model.safetensors.index.json"
    if listing.exists():
        return {name: folder / file for name, file in json.loads(listing.read_text())["weight_map"].items()}
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stream:
                found.update(dict.fromkeys(stream.keys(), file))
        except SafetensorError as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    return found
