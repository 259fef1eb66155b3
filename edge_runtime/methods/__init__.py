"""Federated methods, one file each: what is trained, what is shared, how the node merges it.

A new method is a file with a METHOD, an import and an entry of _FILES below, and a test.
"""

import msgspec

from edge_runtime import settings
from edge_runtime.errors import InputError
from edge_runtime.methods import (
    codistill,
    colora,
    completions,
    fedadapter,
    fedit,
    fedrot,
    fedsa,
    fedsb,
    ffa,
    flexlora,
    flora,
    frames,
    h2tune,
    heterotune,
    hetlora,
    label_head,
    local,
    prelort,
)
from edge_runtime.methods.interface import Method
from edge_runtime.protocol.keys import STATE

MOST_RANK = 256  # of the A and B that a layer multiplies; the limit of edge_kernels.adapter_linear
_FILES = (
    local,
    fedit,
    fedrot,
    ffa,
    fedsa,
    fedsb,
    hetlora,
    flexlora,
    flora,
    prelort,
    fedadapter,
    heterotune,
    h2tune,
    colora,
)
METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in _FILES}


def build(
    spec: settings.MethodChoice,
    head: settings.Head | None = None,
    public: settings.Public | None = None,
    distils: settings.Codistill | None = None,
) -> Method:
    """A method with its settings, a head, and distillation on public texts.

    Raises:
        InputError: the method is unknown, or a setting is unknown or out of range.
    """
    if spec.name not in METHODS:
        raise InputError(f"there is no method `{spec.name}`; known: {', '.join(METHODS)}")
    method = METHODS[spec.name]
    fields = method.settings.__struct_fields__ if method.settings is not None else ()
    settings.refuse_unknown(spec.settings, {*settings.OF_EVERY_METHOD, *fields}, f"[method] {spec.name} ")
    if method.settings is not None:
        try:
            method = msgspec.convert(spec.settings, type(method.settings)).method()
        except msgspec.ValidationError as error:
            raise InputError(f"[method] {spec.name}: {error}") from error
    if head is not None:
        method = label_head.added(method, head)
    if distils is not None and public is not None:
        adds = codistill.added if head is not None else completions.added
        method = adds(method, public, distils)
    if public is not None and method.aligned:
        method = frames.added(method, public.texts)
    return method


def of(fleet: settings.Fleet) -> Method:
    """A fleet's method.

    Raises:
        InputError: as for `build`; or the method cannot merge the ranks that the fleet allows, or
            has no mean of deltas for a server step and momentum, or no answers of single tokens.
    """
    method, adapter = build(fleet.method, fleet.head, fleet.public, fleet.codistill), fleet.adapter
    beside = method.kept or (method.sizes(adapter.rank)["branch"] if method.inner is not None else 0)
    if adapter.rank + beside > MOST_RANK:
        raise InputError(
            f"[adapter] rank is {adapter.rank} and [method] {method.name} adds {beside}, but together they can be "
            f"{MOST_RANK} at most"
        )
    _require_use_of_texts(method, fleet)
    if adapter.lower and not method.unequal:
        candidates = " or ".join(f"`{candidate.name}`" for candidate in METHODS.values() if candidate.unequal)
        raise InputError(
            f"[adapter] lower is {adapter.lower}, but has to be left out with {method.name}, which merges factors of one "
            f"rank, {adapter.rank}; devices of unequal ranks need {candidates}"
        )
    if adapter.lower and method.unequal:
        method = method._replace(step=method.unequal)
    if method.gate is not None and method.answers is not None:
        raise InputError(
            f"[codistill] without a [head] has devices write completions token by token, but the gate of {method.name} "
            'reads whole rows: add [head], leave out [codistill], or set [method] gate = "closed"'
        )
    _require_mean(method, fleet)
    _require_rounds(method, fleet)
    return method


def _require_use_of_texts(method: Method, fleet: settings.Fleet) -> None:
    public = fleet.public
    if public is None:
        if method.aligned:
            raise InputError(
                f"[method] {method.name} compares models by public texts: add [public] with their file"
            )
        return
    if not method.framed and fleet.codistill is None:
        raise InputError(
            "[public] has texts that nothing in the fleet uses: leave it out, or add [codistill], [head] shared = "
            '"fleet", or a method whose branches are in the common frame'
        )
    turned = {"rotated": method.framed, "rotated branches": "F" in method.factors}
    if not turned.get(public.frame, True):
        raise InputError(
            f'[public] frame is "{public.frame}", but has to be left out: nothing that it turns is in this fleet'
        )


def _require_rounds(method: Method, fleet: settings.Fleet) -> None:
    reasons = ["the first makes the common frame"] if method.framed else []
    if fleet.codistill is not None:
        reasons.append("devices learn predictions in the round after them")
    if fleet.rounds <= len(reasons):
        raise InputError(
            f"[fleet] rounds is {fleet.rounds}, but has to be {len(reasons) + 1} or more, as {', and '.join(reasons)}"
        )


def _require_mean(method: Method, fleet: settings.Fleet) -> None:
    choice = fleet.method
    if (choice.server_step, choice.momentum) == (1.0, 0.0):
        return
    ranks = " and devices of unequal ranks" if fleet.adapter.lower else ""
    if method.step != "mean" or not method.merges.keys() & set(STATE):
        raise InputError(
            f"[method] server_step is {choice.server_step:g} and momentum {choice.momentum:g}, but have to be left out "
            f"with {method.name}{ranks}, where a round does not add a mean of the devices' deltas to the version"
        )
