"""Federated methods, one file each: what is trained, what is shared with whom, and how the node merges it."""

from edge_runtime.errors import InputError
from edge_runtime.methods import fedit, fedsa, fedsb, ffa, flexlora, hetlora, local
from edge_runtime.methods.interface import Method
from edge_runtime.settings import Fleet

METHODS = {module.METHOD.name: module.METHOD for module in (local, fedit, ffa, fedsa, fedsb, hetlora, flexlora)}


def by_name(name: str) -> Method:
    """The method of this name; raises InputError with the known ones."""
    if name not in METHODS:
        raise InputError(f"there is no method `{name}`; known: {', '.join(METHODS)}")
    return METHODS[name]


def of(fleet: Fleet) -> Method:
    """A fleet's method; raises InputError where it is not known, or would have to merge factors of unequal ranks."""
    method, adapter = by_name(fleet.method.name), fleet.adapter
    if adapter.lower and not method.unequal:
        others = " or ".join(f"`{other.name}`" for other in METHODS.values() if other.unequal)
        raise InputError(
            f"[adapter] lower is {adapter.lower}, but has to be left out with {method.name}, which merges factors of one "
            f"rank, {adapter.rank}; devices of unequal ranks need {others}"
        )
    return method
