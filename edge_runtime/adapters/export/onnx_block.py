"""A decoder block of a graph: attention over the cache, and the MLP.

The operators are those that ONNX Runtime has for language models on a CPU. GroupQueryAttention
rotates queries and keys, writes keys and values to the cache and attends to them. A norm is one
operator with the sum before it.
Source: onnxruntime's docs/ContribOperators.md; the models: transformers.
"""

from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto
from torch import nn
from transformers import PreTrainedModel

from edge_runtime.adapters.export.onnx_graph import Graph
from edge_runtime.adapters.export.onnx_linear import floats, linear
from edge_runtime.models.families import Family

# transformers' names of activations: ONNX's operator and its attributes
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}),
    "gelu": ("Gelu", {}),
    "gelu_new": ("FastGelu", {}),
    "gelu_pytorch_tanh": ("FastGelu", {}),
    "relu": ("Relu", {}),
}


class Inputs(NamedTuple):
    """Values of the graph's inputs that every block reads."""

    last: str  # (batch,) int32: the last token's position in each row
    total: str  # () int32
    batch: str  # (1,) int64
    shape: str  # (3,) int64: batch, tokens, -1
    rotary: dict[str, tuple[str, str]]  # cos and sin (positions, turned / 2), by the layer's type


class Decoder(NamedTuple):
    """A model that is written. Its states are (rows, width) float32, rows = batch · tokens."""

    graph: Graph
    model: PreTrainedModel
    config: Any  # of the text model
    row: Family
    inputs: Inputs

    def norm(self, x: str, norm: Any, state: str = "") -> tuple[str, str]:
        """The norm of x, or of state + x; and what it is the norm of."""
        graph, name = self.graph, f"norms.{len(self.graph.tensors)}"
        weights = [graph.constant(name, floats(norm.weight) + np.float32(self.row.norm_offset))]
        epsilon = float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
        kind = "SimplifiedLayerNormalization"
        if isinstance(norm, nn.LayerNorm):
            kind = "LayerNormalization"
            weights[0] = graph.constant(f"{name}.weight", floats(norm.weight))
            weights.append(graph.constant(f"{name}.bias", floats(norm.bias)))
        if not state:
            return graph.node(kind, x, *weights, axis=-1, epsilon=epsilon), x
        graph.nodes(
            f"Skip{kind}", [state, x, *weights], [f"{name}.of", "", "", f"{name}.state"], epsilon=epsilon
        )
        return f"{name}.of", f"{name}.state"


def attention_module(block: nn.Module, row: Family) -> Any:
    return block.get_submodule(row.linears["o"].rpartition(".")[0])


def attention(
    decoder: Decoder, x: str, block: nn.Module, parts: dict[str, list[nn.Module]], name: str, number: int
) -> str:
    """Attention over the cache, in which it has the block's number, and the layer after it."""
    graph, config, inputs = decoder.graph, decoder.config, decoder.inputs
    module = attention_module(block, decoder.row)
    size = int(module.head_dim)
    heads, kv_heads = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", config.num_attention_heads),
    )
    x = linear(graph, x, f"{name}.qkv", parts["qkv"], f"{name}.qkv")
    qkv = [x, "", ""]  # in one value, unless queries and keys have norms
    if hasattr(module, "q_norm"):
        widths = graph.constant("qkv.widths", np.array([heads * size, kv_heads * size, kv_heads * size]))
        qkv = [f"{name}.{role}" for role in "qkv"]
        graph.nodes("Split", [x, widths], qkv, axis=-1)
        for place, norm in enumerate((module.q_norm, module.k_norm)):
            each = graph.node("Reshape", qkv[place], graph.constant("heads", np.array([-1, size])))
            normed, _ = decoder.norm(each, norm)
            qkv[place] = graph.node("Reshape", normed, inputs.shape)
        qkv[2] = graph.node("Reshape", qkv[2], inputs.shape)
    else:
        qkv[0] = graph.node("Reshape", x, inputs.shape)
    past, present = [], []
    for part in ("key", "value"):
        shape = ["batch", kv_heads, "past", size]
        past.append(graph.input(f"past_key_values.{number}.{part}", TensorProto.FLOAT, shape))
        present.append(f"present.{number}.{part}")
        graph.output(present[-1], TensorProto.FLOAT, ["batch", kv_heads, "cache", size])
    layer_type = getattr(config, "layer_types", None) and config.layer_types[number]
    tables = inputs.rotary.get(layer_type or "", inputs.rotary.get("", ()))
    windowed = layer_type in (None, "sliding_attention") and getattr(config, "sliding_window", None)
    graph.nodes(
        "GroupQueryAttention",
        [*qkv, *past, inputs.last, inputs.total, *tables],
        [f"{name}.attended", *present],
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=float(module.scaling),
        softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        local_window_size=windowed or -1,
        do_rotary=int(bool(tables)),
    )
    rows = graph.node("Reshape", f"{name}.attended", graph.constant("attended", np.array([-1, heads * size])))
    return linear(graph, rows, f"{name}.o", parts["o"], f"{name}.o")


def mlp(decoder: Decoder, x: str, parts: dict[str, list[nn.Module]], name: str) -> str:
    """The MLP, gated or plain."""
    graph, row = decoder.graph, decoder.row
    operator, attributes = ACTIVATIONS[activation(decoder.config)]
    first, last = ("fc1", "fc2") if row.mlp == "plain" else ("gate_up", "down")
    x = linear(graph, x, f"{name}.{first}", parts[first], f"{name}.{first}")
    if row.mlp != "plain":
        gate, up = f"{name}.gate", f"{name}.up"
        graph.nodes("Split", [x], [gate, up], axis=-1)
        x = graph.node("Mul", graph.node(operator, gate, **attributes), up)
    else:
        x = graph.node(operator, x, **attributes)
    return linear(graph, x, f"{name}.{last}", parts[last], f"{name}.{last}")


def activation(config: Any) -> str:
    """transformers' name of the MLP's activation."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next(value for name in names if (value := getattr(config, name, None)) is not None)
