"""Numbers of a config.json that say how large a model is, compared with its tensors before one is made.

A model of 2^31 layers takes memory for each before any tensor is read. No model has more layers than
its files have tensors, nor is it wider than their longest side. Shapes are compared afterwards, tensor
by tensor (safetensors_index.py).
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import InputError
from edge_runtime.models.headers import Place

LAYERS = ("num_hidden_layers", "n_layer")
# what arrays and modules are made by that are no tensors of the files, such as rotary frequencies
SIDES = ("hidden_size", "n_embd", "head_dim", "image_size", "patch_size")
COUNTS = (
    *(*LAYERS, *SIDES, "intermediate_size", "n_inner", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "max_position_embeddings", "n_positions"),
)
NEEDED = "a whole number, 1 or more, is needed"


def require(folder: Path, stated: dict[str, Any], tensors: Collection[Place]) -> None:
    """Compare what a config.json states.

    Args:
        folder: named in messages.
        stated: config.json; parts of it, such as text_config, are looked at too.
        tensors: of the folder's files; none: weights are drawn at random, in any size.

    Raises:
        InputError: a number is none that counts, or too large for the tensors. The message names it.
    """
    for key, value in _numbers(stated):
        if key not in COUNTS or value is None:
            continue
        reason = "" if type(value) is int and value >= 1 else NEEDED
        if not reason and tensors and key in LAYERS and value > len(tensors):
            reason = f"its files have {len(tensors)} tensors"
        if not reason and tensors and key in SIDES and value > longest(tensors):
            reason = f"the longest side of its tensors is {longest(tensors)}"
        if reason:
            raise InputError(
                f"config.json in {folder} sets {key} to {value!r}, but {reason}: give the config.json that belongs to "
                "these weights"
            )


def longest(tensors: Collection[Place]) -> int:
    """The longest side of tensors."""
    return max(side for place in tensors for side in (*place.shape, 0))


def _numbers(part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        else:
            yield key, value
