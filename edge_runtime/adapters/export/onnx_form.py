"""What those who plan, write and serve a graph for ONNX Runtime agree on; imports neither torch nor NumPy."""

from collections.abc import Iterable

import msgspec

from edge_runtime.models.facts import Facts
from edge_runtime.settings import Role, Weights

FORM = 1  # of a written graph; a change of the graph raises it, so that no older one is taken from a cache
# formats of the weights, the default first; there is no operator for nf4
WEIGHTS: tuple[Weights, ...] = ("q8_0", "float32", "bfloat16", "q4_1", "q4_0")
# Layers that read the same values are one layer in the graph.
GROUPS: dict[str, tuple[Role, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class GraphRequest(msgspec.Struct, frozen=True):
    """Which graph to write, and where."""

    facts: Facts
    depth: int  # layers that the slice keeps
    format: Weights = "float32"
    folder: str | None = None  # that does not exist; None: nothing is written


def groups(roles: Iterable[Role]) -> dict[str, tuple[Role, ...]]:
    """The linear layers of a block that are one layer of the graph, by its name."""
    present = [*roles]
    whole = {name: group for name, group in GROUPS.items() if {*group} <= {*present}}
    return whole | {role: (role,) for role in present if not any(role in group for group in whole.values())}
