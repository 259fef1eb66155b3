"""Bytes beside weights and adapter in the stages around training: of the start, the frame, and a head's rows.

The factors were fitted to measured peaks; `make bench-peak` prints prediction beside measurement.
"""

from collections.abc import Mapping, Sequence

from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Role

# Activations of the public texts that are in memory at once while maps into the frame are made.
FRAME_BYTES = 64 << 20
# Copies of the states, and squares of their smaller side, that their singular vectors take; squares of
# a layer's width that its map takes. Measured with 500 to 3,000 texts and widths of 576 to 2,048.
SVD_COPIES, SVD_SQUARES, SOLVE_SQUARES = 10, 13, 6

MOST_ROWS = 512  # of a device's own whose head inputs are in memory at once, beside those of public texts


def of_start(method: Method, values: Mapping[str, int]) -> int:
    """Of the whole state that a round starts from, the version, and private factors as a file and read.

    values: numbers in each of the adapter's factors, over all layers.
    """
    shared = sum(value for name, value in values.items() if method.factors[name].exchanged)
    private = sum(value for name, value in values.items() if method.factors[name].private)
    return 4 * (sum(values.values()) + shared + 2 * private)


def of_head(hidden: int, texts: int) -> int:
    """Of head inputs of rows and texts, and of their covariance; each is there twice, in float32."""
    return 8 * hidden * (MOST_ROWS + texts + hidden)


def of_frame(facts: Facts, method: Method, roles: Sequence[Role], plan: Plan, forward: int) -> int:
    """Of the larger of two phases: features of public texts, and maps into the frame.

    Args:
        roles: of the adapter.
        forward: bytes of a micro-batch's pass through the model, whose MLPs have no tiles.
    """
    sizes, hidden = method.sizes(plan.rank), facts.hidden
    texts, aligned = sizes["texts"], "F" in method.factors
    features = texts * (SVD_COPIES * hidden + sizes["features"]) + SVD_SQUARES * min(texts, hidden) ** 2
    layers = [shape for role, shape in facts.linears.items() if aligned and role in roles] or [(0, hidden)]
    largest = texts * max(into for _, into in layers)
    every = texts * plan.depth * sum(into for _, into in layers)
    # activations of a group of layers; Z as published and turned; maps, until they are on the adapter
    held = max(min(FRAME_BYTES // 4, every), largest) + 2 * texts * sizes["frame"]
    held += sizes["branch"] * plan.depth * sum(map(sum, layers)) if aligned else 0
    # then a layer's centred activations, and its map
    solved = largest + max(SOLVE_SQUARES * into * into + out * into for out, into in layers)
    return max(4 * features, 4 * held + max(forward, 4 * solved))
