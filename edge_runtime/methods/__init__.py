"""Federated methods, one file each: what is trained, what is shared with whom, and how the node merges it."""

from typing import Any

import msgspec

from edge_runtime import settings
from edge_runtime.errors import InputError
from edge_runtime.methods import (
    codistill,
    completions,
    fedadapter,
    fedit,
    fedsa,
    fedsb,
    ffa,
    flexlora,
    flora,
    h2tune,
    heterotune,
    hetlora,
    label_head,
    local,
)
from edge_runtime.methods.interface import Method

MOST_RANK = 256  # of what a layer multiplies, as edge_kernels.adapter_linear has it
MODULES: tuple[Any, ...] = (
    local,
    fedit,
    ffa,
    fedsa,
    fedsb,
    hetlora,
    flexlora,
    flora,
    fedadapter,
    heterotune,
    h2tune,
)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in MODULES}


def by_name(name: str) -> Method:
    """The method of this name; raises InputError with the known ones."""
    if name not in METHODS:
        raise InputError(f"there is no method `{name}`; known: {', '.join(METHODS)}")
    return METHODS[name]


def build(spec: settings.Method, head: settings.Head | None, distils: settings.Codistill | None) -> Method:
    """A method with what the fleet adds to it; raises InputError where it is not known, or its settings do not fit."""
    method = _with_settings(spec)
    if head is not None:
        method = label_head.added(method, head)
    if distils is not None:
        form = codistill if head is not None else completions
        method = form.added(method, distils)
    return method


def _with_settings(spec: settings.Method) -> Method:
    method = by_name(spec.name)
    module = next(module for module in MODULES if module.METHOD is method)
    known = getattr(module, "Settings", None)
    fields = known.__struct_fields__ if known is not None else ()
    settings.refuse_unknown(spec.settings, {"name", *fields}, f"[method] {spec.name} ")
    if known is None:
        return method
    try:
        made: Method = module.method(msgspec.convert(spec.settings, known))
    except msgspec.ValidationError as error:
        raise InputError(f"[method] {spec.name}: {error}") from error
    return made


def of(fleet: settings.Fleet) -> Method:
    """A fleet's method; raises InputError where it is not known, or would have to merge factors of unequal ranks."""
    method, adapter = build(fleet.method, fleet.head, fleet.codistill), fleet.adapter
    kept = method.sizes(adapter.rank).get("kept", 0)
    if adapter.rank + kept > MOST_RANK:
        raise InputError(
            f"[adapter] rank is {adapter.rank} and [method] kept {kept}, but together they can be {MOST_RANK} at most"
        )
    if adapter.lower and not method.unequal:
        others = " or ".join(f"`{other.name}`" for other in METHODS.values() if other.unequal)
        raise InputError(
            f"[adapter] lower is {adapter.lower}, but has to be left out with {method.name}, which merges factors of one "
            f"rank, {adapter.rank}; devices of unequal ranks need {others}"
        )
    return method
