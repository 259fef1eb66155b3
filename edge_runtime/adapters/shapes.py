"""Keys and shapes of a device's adapter, from the model's facts alone; no model is loaded."""

from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.settings import Role


def adapter_shapes(
    facts: Facts, layers: tuple[int, ...], roles: tuple[Role, ...], rank: int, method: Method
) -> dict[str, tuple[int, ...]]:
    """Shape of each factor by canonical key, without the rows of a label head."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        for role, (out, into) in facts.linears.items():
            if role in roles:
                sizes = method.lengths(rank, into, out)
                keys = method.keys(layer, facts.layers, role)
                shapes |= {key: method.factors[name].shape(sizes) for name, key in keys.items()}
    return shapes
