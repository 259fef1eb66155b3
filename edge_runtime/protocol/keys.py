"""Canonical keys: what a tensor of an adapter's state is called, in files and on the wire.

layers.<i>.<role>.<factor>     a linear layer, by its number in the whole checkpoint
stages.<s>.<role>.<factor>     all layers at about the same relative depth
labels.<label>.<factor>        a label that rows are told apart by
anchors.<label>.<factor>       the same label, on the fleet's public texts
"""

import re
from collections.abc import Sequence

LABEL = re.compile(r"[^\x00-\x1f]{1,80}")


def kind_of(key: str) -> str:
    """What a tensor belongs to: the first part of its key."""
    return key.partition(".")[0]


def name_of(key: str) -> str:
    """Which factor a tensor is: the last part of its key."""
    return key.rpartition(".")[2]


def label_of(key: str) -> str:
    """The label of labels.<label>.<factor> or anchors.<label>.<factor>."""
    return key.partition(".")[2].rpartition(".")[0]


def leading(shape: Sequence[int]) -> tuple[slice, ...]:
    """Where a factor of a lower rank has its values in one of a higher."""
    return tuple(map(slice, shape))
