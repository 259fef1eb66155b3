"""Linear layers of a graph: frozen matrices, packed or not, and an adapter that is an input.

    y = x Wᵀ (+ bias) + (x A) B        A (in, rank), B (rank, out); rank 0 where nobody gives them

Layers that read the same x are one layer, whose matrices stand one below the other. Packed matrices
keep their numbers:

    q8_0    w = d (q - 128)                MatMulNBits of 8 bits, q in 0..255
    q4_0    w = d (q - 8)                  MatMulNBits of 4 bits
    q4_1    w = d (q - 8) + (m + 8 d)      the same, plus each block's sum of x times (m + 8 d)

MatMulNBits also has zero points that are no integers, as q4_1 needs; it is twenty times slower then.
Source: onnxruntime's docs/ContribOperators.md.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from edge_kernels import Packed
from edge_kernels.quant import BLOCK
from onnx import TensorProto
from torch import nn

from edge_runtime.adapters.export.onnx_graph import Array, Extent, Graph
from edge_runtime.errors import InputError
from edge_runtime.models import structure
from edge_runtime.models.readers import PIECE_VALUES

BITS = {"q8_0": 8, "q4_0": 4, "q4_1": 4}
INT8 = 4  # accuracy_level of MatMulNBits: x is rounded to int8 too, block by block


class Matrix(NamedTuple):
    """A frozen matrix (out, in) in the data file."""

    name: str
    shape: tuple[int, int]
    format: str  # of its blocks; "": float32
    places: tuple[Extent, ...]  # of its numbers, and of the scales


def linear(graph: Graph, x: str, name: str, layers: Sequence[nn.Module], adapter: str = "") -> str:
    """Write layers that are one.

    Args:
        x: (rows, in) float32.
        name: of the weights.
        layers: their matrices stand one below the other.
        adapter: what the names of A and B begin with; "": without an adapter.

    Returns:
        (rows, out of all layers).
    """
    matrix = store(graph, name, [structure.matrix(layer) for layer in layers])
    biases = [] if getattr(layers[0], "bias", None) is None else [floats(layer.bias) for layer in layers]
    y = product(graph, x, matrix, biases)
    if adapter:
        out, into = matrix.shape
        A = graph.input(
            f"{adapter}.A", TensorProto.FLOAT, [into, f"{adapter}.rank"], np.zeros((into, 0), np.float32)
        )
        B = graph.input(
            f"{adapter}.B", TensorProto.FLOAT, [f"{adapter}.rank", out], np.zeros((0, out), np.float32)
        )
        y = graph.node("Gemm", graph.node("MatMul", x, A), B, y)
    return y


def store(graph: Graph, name: str, matrices: Sequence[torch.Tensor | Packed]) -> Matrix:
    """Write matrices of one format, one below the other, to the data file."""
    shape = (sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1])
    if not isinstance(matrices[0], Packed):
        return Matrix(name, shape, "", (graph.weight(name, _pieces(matrices, floats)),))
    if (format := matrices[0].format) not in BITS:
        raise InputError(
            f"{name} is in {format}, which ONNX Runtime's fast operators do not have: export from float32, bfloat16 "
            f"or {', '.join(BITS)}"
        )
    places = (
        graph.weight(f"{name}.quants", _pieces([each.quants for each in matrices], partial(_quants, format))),
        graph.weight(f"{name}.scales", _pieces([each.scales for each in matrices], floats)),
    )
    if format == "q4_1":
        shifts = [8 * matrix.scales.float() + matrix.mins for matrix in matrices if matrix.mins is not None]
        graph.weight(f"{name}.shift", [torch.cat(shifts).T.numpy()])
    return Matrix(name, shape, format, places)


def product(graph: Graph, x: str, matrix: Matrix, biases: Sequence[Array] = ()) -> str:
    """x Wᵀ + bias, (rows, in) to (rows, out)."""
    (out, into), name = matrix.shape, matrix.name
    bias = graph.weight(f"{name}.bias", biases) and f"{name}.bias" if biases else ""
    if not matrix.format:
        return graph.node("Gemm", x, name, *([bias] if bias else []), transB=1)
    operands = [x, f"{name}.quants", f"{name}.scales", *(["", "", bias] if bias else [])]
    bits, size = BITS[matrix.format], BLOCK[matrix.format]
    y = graph.node("MatMulNBits", *operands, K=into, N=out, bits=bits, block_size=size, accuracy_level=INT8)
    if matrix.format != "q4_1":
        return y
    blocks = np.arange(into)[:, None] // size == np.arange(-(-into // size))
    sums = graph.node("MatMul", x, graph.constant(f"blocks.{into}", blocks.astype(np.float32)))
    return graph.node("Gemm", sums, f"{name}.shift", y)


def share(graph: Graph, name: str, matrix: Matrix) -> Matrix:
    """The same matrix under another name, as the rows of a table where it is packed."""
    if matrix.format:
        out, into = matrix.shape
        graph.view(f"{name}.quants", np.uint8, (out, into), matrix.places[0])
        graph.view(f"{name}.scales", np.float32, (out, into // BLOCK[matrix.format]), matrix.places[1])
    return matrix._replace(name=name)


def floats(tensor: torch.Tensor) -> Array:
    """A dense tensor as float32."""
    return tensor.detach().float().numpy()


def _pieces(matrices: Sequence[torch.Tensor], written: Callable[[torch.Tensor], Array]) -> Iterator[Array]:
    """Some rows of the matrices at a time, as the graph has them: a whole embedding would be there twice."""
    for matrix in matrices:
        yield from map(written, matrix.split(max(PIECE_VALUES // matrix.shape[1], 1)))


def _quants(format: str, rows: torch.Tensor) -> Array:
    """(rows, blocks, bytes of a block): MatMulNBits has two neighbours in a byte, GGUF a block's halves."""
    blocks = rows.view(len(rows), -1, BLOCK[format] * BITS[format] // 8)
    if format == "q8_0":
        return (blocks.view(torch.uint8) ^ 128).numpy()
    values = torch.cat((blocks & 15, blocks >> 4), -1)
    return (values[..., 0::2] | values[..., 1::2] << 4).numpy()
