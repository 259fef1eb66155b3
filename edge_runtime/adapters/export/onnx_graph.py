"""Writes an ONNX graph node by node; its weights go to a file beside it, one matrix at a time.

    model.onnx         nodes, inputs, outputs and small constants
    model.onnx.data    weights, each at an offset that is a multiple of a memory page

ONNX Runtime maps the second file, so weights that are read once are not in memory twice.
Sources: ONNX's external data; onnxruntime's docs/ContribOperators.md for the domain com.microsoft.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.adapters.export.onnx_session import DATA, MODEL

OPSET, IR = 17, 8  # the oldest that have every operator below and may override initializers
PAGE = 4096
SMALL = 1024  # bytes up to which a constant stays in the graph
CONTRIB = "com.microsoft"
# operators of ONNX Runtime; SimplifiedLayerNormalization it keeps in ONNX's domain
CONTRIB_OPERATORS = frozenset(
    {"FastGelu", "GatherBlockQuantized", "Gelu", "GroupQueryAttention", "MatMulNBits", "QuickGelu"}
    | {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
Array = NDArray[Any]


class Extent(NamedTuple):
    """Where a weight lies in the data file."""

    offset: int
    length: int


class Graph:
    """A graph that grows; its values have names."""

    def __init__(self, folder: Path) -> None:
        """folder: an empty one, which gets both files."""
        self._folder, self._stream = folder, (folder / DATA).open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> "Graph":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator with one output, and return the output's name."""
        output = output or f"{operator}_{len(self._nodes)}"
        self.nodes(operator, inputs, [output], **attributes)
        return output

    def nodes(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add an operator whose outputs have names; "" stands for an operand that is not there."""
        domain, name = CONTRIB if operator in CONTRIB_OPERATORS else "", f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, outputs, name, domain=domain, **attributes))

    def constant(self, name: str, value: Array) -> str:
        """A constant of the graph, once for each name."""
        if name not in self.tensors:
            if value.nbytes <= SMALL:
                self.tensors[name] = numpy_helper.from_array(value, name)
            else:
                self.weight(name, [value])
        return name

    def weight(self, name: str, parts: Iterable[Array]) -> Extent:
        """A constant in the data file, of parts that stand one below the other. Returns its extent."""
        first, rows = -(-self._stream.tell() // PAGE) * PAGE, 0
        self._stream.seek(first)
        for part in parts:
            np.ascontiguousarray(part).tofile(self._stream)
            rows, dtype, widths = rows + len(part), part.dtype, part.shape[1:]
        extent = Extent(first, self._stream.tell() - first)
        self.view(name, dtype, (rows, *widths), extent)
        return extent

    def view(self, name: str, dtype: Any, shape: Sequence[int], extent: Extent) -> None:
        """A constant over bytes of the data file that another one has too."""
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in {"location": DATA, **extent._asdict()}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors[name] = tensor

    def input(self, name: str, kind: int, shape: Sequence[int | str], default: Array | None = None) -> str:
        """An input. kind: of TensorProto; default: what it is where nobody gives it."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if default is not None:
            self.tensors[name] = numpy_helper.from_array(default, name)
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """Make a value an output."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def save(self, name: str, metadata: dict[str, str]) -> None:
        """Write the graph beside its data."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self.tensors.values()))
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=IR)
        helper.set_model_props(model, metadata)
        self._stream.flush()
        (self._folder / MODEL).write_bytes(model.SerializeToString())


def in_float32(content: bytes) -> bytes:
    """The same graph, whose packed matrices are multiplied by activations in float32."""
    model = onnx.load_from_string(content)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return model.SerializeToString()
