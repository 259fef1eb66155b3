"""Bounds of a field's value, and the sentence that names a value out of bounds."""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec
from edge_broker import topics

from edge_runtime.errors import InputError


class Bound(NamedTuple):
    """What a field's value has to be, beside its type; a value of None is not checked."""

    holds: Callable[[Any], bool]
    needed: str


Count = Annotated[int, Bound(lambda value: value >= 0, "0 or more")]
Positive = Annotated[int, Bound(lambda value: value >= 1, "1 or more")]
Factor = Annotated[float, Bound(lambda value: 0 < value < math.inf, "a number above 0")]
TopicName = Annotated[str, Bound(lambda name: re.fullmatch(topics.NAME, name), topics.NAME_FORM)]
PathText = Annotated[str, Bound(lambda text: "\0" not in text, "text without a NUL character")]
SECONDS = Bound(lambda value: 0 < value < math.inf, "a number of seconds above 0")


def check_fields(table: msgspec.Struct, where: str, of: str = "") -> None:
    """Raise InputError for the first field that is out of bounds; `where` and `of` name the table."""
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        for bound in getattr(field.type, "__metadata__", ()):
            require(f"{where} {field.name}{of}", value, value is None or bound.holds(value), bound.needed)


def require(key: str, value: Any, holds: bool, needed: str) -> None:
    """Raise InputError unless `holds`, with the key, its value and what is needed."""
    if not holds:
        shown = repr(value) if isinstance(value, str) else value
        raise InputError(f"{key} is {shown}, but has to be {needed}")
