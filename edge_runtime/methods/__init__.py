"""Federated methods, one file each: what is trained, what is shared with whom, and how the node merges it."""

from edge_runtime.errors import InputError
from edge_runtime.methods import fedit, local
from edge_runtime.methods.interface import Method

METHODS = {method.name: method for method in (local.METHOD, fedit.METHOD)}


def by_name(name: str) -> Method:
    """The method of this name; raises InputError with the known ones."""
    if name not in METHODS:
        raise InputError(f"there is no method `{name}`; known: {', '.join(METHODS)}")
    return METHODS[name]
