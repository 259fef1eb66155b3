"""What a fleet has learned, out of its node's state: a version of a model class, for one depth slice.

    exchanged factors    as their chain was published, and as devices have them
    frozen factors       drawn from the fleet's seed, as on each device
    private factors      on no node: the version is refused

Needs torch, which a running node does without.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_runtime import methods
from edge_runtime.adapters import learned
from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.learned import Learned
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator.store import NodeStore
from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol.keys import STATE, parse
from edge_runtime.protocol.round import FLEET
from edge_runtime.settings import Adapter, Head, MethodChoice


def read(
    state: Path, find: Callable[[str], Facts], name: str | None, version: int | None, depth: int | None
) -> Learned:
    """The adapter of a class.

    Args:
        state: the node's folder.
        find: returns the facts of a catalog's source.
        name: of the class, with its digest or without; None: the only one.
        version: the round that it was published after; None: the newest.
        depth: layers of the slice; None: those of the deepest that a device has trained.

    Raises:
        InputError: the state, the class, the version or the depth is not there; or the method keeps
            factors on the devices, or takes them out of each device's weights.
    """
    if not (state / "node.db").exists():
        raise InputError(f"{state} is no node's state: it has no node.db")
    store = NodeStore(state / "node.db")
    kept, fixed = store.kept_versions(), store.fixed()
    if not fixed:
        raise InputError(
            f"the node of {state} has opened no round, so nothing was learned: wait for its first merged round"
        )
    head = msgspec.json.decode(fixed["[head]"], type=Head | None)
    method = methods.build(msgspec.json.decode(fixed["[method]"], type=MethodChoice), head)
    _require_whole(method)
    classes = sorted(kept.keys() - {FLEET})
    if not classes:
        raise InputError(
            f"the node of {state} has merged no round, so nothing was learned: wait for its first merged round"
        )
    model_class = _class(classes, name, state)
    plans, versions = store.plans(model_class), kept[model_class]
    store.connection.close()
    if not plans:
        raise InputError(
            f"no device has reported how it trains {model_class} to the node of {state}, so its base is not known: "
            "export on a device, with --state"
        )
    number = max(versions) if version is None else version
    if number not in versions:
        numbers = ", ".join(map(str, versions))
        raise InputError(
            f"there is no version {number} of {model_class} in {state}; versions there: {numbers}"
        )
    facts = find(plans[-1].source)
    learned.require_weights(model_class, facts)
    layers = _layers(facts, depth or max(plan.depth for plan in plans))
    spec, seed = msgspec.json.decode(fixed["[adapter]"], type=Adapter), int(fixed["[fleet] seed"])
    factors = published(versions[number].chain, seed, method, lambda key: parse(key).kind in STATE)
    for key, shape in adapter_shapes(facts, layers, spec.roles, spec.rank, method).items():
        if key not in factors:
            factors[key] = initial(key, shape, seed, method.factor(key))
    return learned.fold(factors, facts, layers, spec, method, number)


def _class(classes: list[str], name: str | None, state: Path) -> str:
    fitting = [each for each in classes if name in (None, each, each.partition("@")[0])]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(classes)
    asked = "" if name is None else f" `{name}`"
    raise InputError(f"{state} has {len(fitting)} model classes{asked}: choose with --class; known: {known}")


def _require_whole(method: Method) -> None:
    """Refuse a method whose version is not all of an adapter."""
    private = [name for name, factor in method.factors.items() if factor.private and factor.of != "labels"]
    if private:
        raise InputError(
            f"with {method.name} each device keeps {', '.join(private)} to itself, so the node has no adapter: export on "
            "a device, with --state"
        )
    if method.aligned:
        raise InputError(
            "each device maps its own activations into the fleet's common frame, so the node has no head or adapter of a "
            "model: export on a device, with --state"
        )
    if method.reads_weights:
        raise InputError(
            f"with {method.name} each device takes factors out of its own weights, so the node has no adapter: export on "
            "a device, with --state"
        )


def _layers(facts: Facts, depth: int) -> tuple[int, ...]:
    try:
        return kept_layers(depth, facts.layers)
    except ValueError as error:
        raise InputError(str(error)) from error
