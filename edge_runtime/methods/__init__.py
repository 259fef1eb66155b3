"""Federated methods, one file each: what is trained, what is shared with whom, and how the node merges it."""

from edge_runtime.errors import InputError
from edge_runtime.methods import fedit, local
from edge_runtime.methods.interface import Method
from edge_runtime.settings import Fleet

METHODS = {method.name: method for method in (local.METHOD, fedit.METHOD)}


def by_name(name: str) -> Method:
    """The method of this name; raises InputError with the known ones."""
    if name not in METHODS:
        raise InputError(f"there is no method `{name}`; known: {', '.join(METHODS)}")
    return METHODS[name]


def of(fleet: Fleet) -> Method:
    """A fleet's method; raises InputError where it is not known, or would have to merge factors of unequal ranks."""
    method, adapter = by_name(fleet.method.name), fleet.adapter
    if adapter.lower and method.merger is not None:
        raise InputError(
            f"[adapter] lower is {adapter.lower}, but has to be left out with {method.name}, which merges factors of one "
            f"rank, {adapter.rank}; devices of unequal ranks need a method that exchanges nothing, such as `local`"
        )
    return method
