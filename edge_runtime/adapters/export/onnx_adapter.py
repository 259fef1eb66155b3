"""An adapter as inputs of the graph (onnx_linear.py), and as the file that ONNX Runtime loads.

    layers.L.GROUP.A (in, rank)     one below the other, turned: A of each layer of the group
    layers.L.GROUP.B (rank, out)    B of each of these layers, beside and below zeros
    labels.H (labels, hidden)       of a label head

Layers that read the same values are one layer in the graph: q, k and v are the group qkv, gate and
up are gate_up. A layer that is not adapted is absent: the graph has rank 0 for it.
"""

from pathlib import Path

import numpy as np
from onnxruntime import AdapterFormat, OrtValue

from edge_runtime.adapters.export.onnx_form import groups
from edge_runtime.adapters.learned import Array, Learned
from edge_runtime.protocol.keys import join
from edge_runtime.settings import Role

HEAD = "labels.H"


def inputs(learned: Learned) -> dict[str, OrtValue]:
    """What the graph takes, by name; the values hold the arrays' memory."""
    arrays = {} if learned.head is None else {HEAD: learned.head}
    for layer in learned.layers:
        for name, roles in groups(learned.facts.linears).items():
            if any((layer, role) in learned.factors for role in roles):
                A, B = _joined(learned, layer, roles)
                arrays |= {join("layers", layer, name, "A"): A, join("layers", layer, name, "B"): B}
    return {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _joined(learned: Learned, layer: int, roles: tuple[Role, ...]) -> tuple[Array, Array]:
    """A (in, rank) and B (rank, out) of a group, whose rank is the sum of its layers' ranks."""
    downs, ups = [], []
    widths = [learned.facts.linears[role][0] for role in roles]
    for place, role in enumerate(roles):
        if (factors := learned.factors.get((layer, role))) is not None:
            A, B = factors
            before, after = sum(widths[:place]), sum(widths[place + 1 :])
            downs.append(A)
            ups.append(np.pad(B.T, ((0, 0), (before, after))))
    return np.concatenate(downs).T, np.concatenate(ups)


def write(learned: Learned, file: Path) -> None:
    """Write the file for `onnxruntime.LoraAdapter`."""
    adapter = AdapterFormat()
    adapter.set_adapter_version(learned.version)
    adapter.set_model_version(1)
    values = inputs(learned)  # a name: the adapter does not keep them alive
    adapter.set_parameters(values)
    adapter.export_adapter(str(file))
