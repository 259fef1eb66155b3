"""Canonical keys: the names of an adapter's tensors. Only this file knows their grammar.

    layers.<layer>.<role>.<factor>    a linear layer, by the layer's number in the checkpoint
    stages.<stage>.<role>.<factor>    all layers at about the same relative depth
    peers.<stage>.<role>.<factor>     the same layers; each device has its own tensor (methods/colora.py)
    labels.<label>.<factor>           a label that rows are classified by
    anchors.<label>.<factor>          the same label, on the fleet's public texts
    frame.<factor>                    the common frame of all models (methods/frames.py)

A place is a key without its factor: all factors of one linear layer have the same place.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, cast

from edge_runtime.errors import InputError

Kind = Literal["layers", "stages", "peers", "labels", "anchors", "frame"]
# kinds whose deltas devices send; of the others they send values
STATE: tuple[Kind, ...] = ("layers", "stages", "labels")
# without what moves a terminal's cursor: control characters, and separators of lines and paragraphs
LABEL = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,80}")

_NUMBER = "0|[1-9][0-9]{0,3}"
_GRAMMAR = re.compile(
    rf"(?P<numbered>layers|stages|peers)\.(?P<number>{_NUMBER})\.(?P<role>[a-z0-9_]{{1,16}})\.(?P<factor>[A-Za-z]{{1,16}})"
    rf"|(?P<labelled>labels|anchors)\.(?P<label>{LABEL.pattern})\.(?P<letter>[A-Z])"
    r"|frame\.(?P<alone>[A-Z])"
)


class Key(NamedTuple):
    """A canonical key in its parts."""

    kind: Kind
    owner: int | str  # the number of the layer or stage, or the label; empty for the frame
    role: str  # of a linear layer, such as q or down; empty for all else
    factor: str

    @property
    def place(self) -> str:
        """The key without its factor."""
        return join(*(part for part in (self.kind, self.owner, self.role) if part != ""))


@lru_cache(maxsize=1 << 14)
def parse(text: str) -> Key:
    """The parts of a canonical key.

    Raises:
        InputError: the text is outside the grammar.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise InputError(f"{text[:80]!r} is no canonical key of an adapter's tensor")
    if match["numbered"]:
        return Key(cast(Kind, match["numbered"]), int(match["number"]), match["role"], match["factor"])
    if match["alone"]:
        return Key("frame", "", "", match["alone"])
    return Key(cast(Kind, match["labelled"]), match["label"], "", match["letter"])


def join(*parts: str | int) -> str:
    """A key from its parts: a place and a factor, or all parts from the kind to the factor."""
    return ".".join(map(str, parts))


def label_of(key: str) -> str:
    """The label of a tensor of kind labels or anchors."""
    return str(parse(key).owner)


def leading(shape: Sequence[int]) -> tuple[slice, ...]:
    """The part of a factor of higher rank that a factor of this lower-rank shape fills."""
    return tuple(map(slice, shape))
