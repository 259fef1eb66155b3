"""A loaded decoder as an ONNX graph: prefill and step in one, with the cache and the adapter as inputs.

    input_ids (batch, tokens) int64                 the tokens that are new
    attention_mask (batch, total) int64             1 for each token of a row, past ones too
    past_key_values.N.key, .value                   (batch, kv_heads, past, head_dim) float32, N from 0
    layers.L.GROUP.A, .B                            the adapter (onnx_linear.py), L: the checkpoint's number
    labels.H (labels, hidden)                       of a label head; default: no label
    logits_from (1,) int64                          first new token whose logits are given; default: 0
    -> logits (batch, kept, vocabulary), label_logits (batch, kept, labels), present.N.key, .value

Keys and values may lie in a longer cache: past and present are then one memory of any length from
`total` on, and GroupQueryAttention writes the new ones to their place.
Sources: names and cache are those of onnxruntime-genai; operators: docs/ContribOperators.md of
onnxruntime; the models: transformers.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from edge_kernels import Packed
from onnx import TensorProto
from transformers import PreTrainedModel

from edge_runtime.adapters.export.onnx_adapter import HEAD
from edge_runtime.adapters.export.onnx_block import (
    ACTIVATIONS,
    Decoder,
    Inputs,
    activation,
    attention,
    attention_module,
    mlp,
)
from edge_runtime.adapters.export.onnx_form import groups
from edge_runtime.adapters.export.onnx_graph import Graph
from edge_runtime.adapters.export.onnx_linear import Matrix, floats, product, share, store
from edge_runtime.errors import InputError
from edge_runtime.models import structure
from edge_runtime.protocol.keys import join

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
EPSILON = float(np.finfo(np.float32).eps)  # of torch.nn.functional.rms_norm


def write(graph: Graph, model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Write the whole model.

    Args:
        graph: empty.
        model: as `weights.load` returns it, without an adapter.
        layers: the blocks' numbers in the checkpoint.

    Raises:
        InputError: the model computes something that the graph cannot.
    """
    check(model)
    config, row = model.config.get_text_config(), structure.family(model)
    decoder = Decoder(graph, model, config, row, _inputs(graph, model))
    state, table = _embedding(decoder)
    blocks = structure.blocks(model)
    norms = [[block.get_submodule(name) for name in row.norms] for block in blocks]
    final = [module for module in model.base_model.children() if "Norm" in type(module).__name__][-1]
    normed, state = decoder.norm(state, norms[0][0])
    for number, layer in enumerate(layers):
        block, name = blocks[number], join("layers", layer)
        linears = structure.linears(block, row)
        parts = {group: [linears[role] for role in roles] for group, roles in groups([*linears]).items()}
        following = [*norms[number][1:], norms[number + 1][0] if number + 1 < len(blocks) else final]
        attended = attention(decoder, normed, block, parts, name, number)
        if len(following) == 1:  # attention and MLP side by side
            x = graph.node("Add", attended, mlp(decoder, normed, parts, name))
        else:
            after, before, *rest = [None, *following] if not row.norms_after else following
            x = attended if after is None else decoder.norm(attended, after)[0]
            normed, state = decoder.norm(x, before, state)
            x = mlp(decoder, normed, parts, name)
            x = decoder.norm(x, rest[0])[0] if row.norms_after else x
        normed, state = decoder.norm(x, following[-1], state)
    _head(decoder, normed, table)


def check(model: PreTrainedModel) -> None:
    """Refuse what the graph cannot compute; raises InputError."""
    config = model.config.get_text_config()
    packed = isinstance(model.get_input_embeddings().weight, Packed)
    turned = [pair[0].shape[-1] for pair in _tables(model, 1).values()]
    head = attention_module(structure.blocks(model)[0], structure.family(model)).head_dim
    problems = {
        f"the activation {activation(config)}": activation(config) not in ACTIVATIONS,
        "attention to later tokens": bool(getattr(config, "use_bidirectional_attention", False)),
        "LayerNorms of query and key": bool(getattr(config, "qk_layernorm", False)),
        "a packed embedding whose rows are no whole blocks of 32": packed and config.hidden_size % 32 != 0,
        f"heads of {head} values": bool(turned) and head % 16 != 0,
        f"rotary embeddings of {2 * min(turned, default=0)} values": any(half % 8 for half in turned),
    }
    for problem in (text for text, holds in problems.items() if holds):
        raise InputError(
            f"the {config.model_type} model has {problem}, which the graph for ONNX Runtime cannot compute: serve it "
            "with torch, or export it to peft, gguf or merged"
        )


def positions(config: Any) -> int:
    """Tokens that a sequence may have in the graph of a model with this configuration."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_type = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    # beyond that length longrope turns earlier tokens by other angles too
    lengths = [
        each["original_max_position_embeddings"] for each in by_type if each.get("rope_type") == "longrope"
    ]
    return min([config.max_position_embeddings, *lengths])


def _inputs(graph: Graph, model: PreTrainedModel) -> Inputs:
    for name, value in {"one": [1], "first": 0, "rest": [-1]}.items():
        graph.constant(name, np.array(value, np.int64))
    ids = graph.input("input_ids", INT64, ["batch", "tokens"])
    mask = graph.input("attention_mask", INT64, ["batch", "total"])
    last = graph.node("Sub", graph.node("ReduceSum", mask, "one", keepdims=0), "one")
    total = graph.node("Gather", graph.node("Shape", mask), graph.constant("second", np.array(1, np.int64)))
    size = graph.node("Shape", ids)
    batch = graph.node("Slice", size, graph.constant("zero", np.array([0], np.int64)), "one")
    shape = graph.node("Concat", size, "rest", axis=0)
    last, total = (graph.node("Cast", value, to=INT32) for value in (last, total))
    return Inputs(last, total, batch, shape, _rotary(graph, model))


def _rotary(graph: Graph, model: PreTrainedModel) -> dict[str, tuple[str, str]]:
    names = {}
    for layer_type, tables in _tables(model, positions(model.config.get_text_config())).items():
        names[layer_type] = (f"rotary.{layer_type}.cos", f"rotary.{layer_type}.sin")
        for name, table in zip(names[layer_type], tables, strict=True):
            graph.weight(name, [floats(table)])
    return names


def _tables(model: PreTrainedModel, tokens: int) -> dict[str, list[torch.Tensor]]:
    """cos and sin (tokens, turned / 2) by the layers' type, as the model's own module computes them."""
    module: Any = getattr(model.base_model, "rotary_emb", None)
    if module is None:
        return {}
    typed = getattr(module, "layer_types", None)
    arguments = (torch.zeros(1), torch.arange(tokens)[None])
    tables = {name: module(*arguments, *([name] if typed else [])) for name in typed or ("",)}
    return {name: [table[0, :, : table.shape[-1] // 2] for table in pair] for name, pair in tables.items()}


def _embedding(decoder: Decoder) -> tuple[str, Matrix]:
    """The first state, and the embedding's matrix."""
    graph, model, embedding = decoder.graph, decoder.model, cast(Any, decoder.model.get_input_embeddings())
    table = store(graph, "embedding", [embedding.weight])
    if table.format:
        share(graph, "embedding.rows", table)
        operands = ("embedding.rows.quants", "input_ids", "embedding.rows.scales")
        state = graph.node("GatherBlockQuantized", *operands, bits=8, block_size=32, quantize_axis=1)
    else:
        state = graph.node("Gather", "embedding", "input_ids")
    rows = graph.constant("rows", np.array([-1, table.shape[1]], np.int64))
    state = graph.node("Reshape", state, rows)
    if (factor := embedding_factor(embedding)) != 1:
        state = graph.node("Mul", state, graph.constant("embedding.factor", floats(factor)))
    if (learned := getattr(model.base_model, "wpe", None)) is not None:
        graph.weight("positions", [floats(learned.weight)])
        places = graph.node("Gather", "positions", _positions(graph, decoder.inputs))
        state = graph.node("Add", state, graph.node("Reshape", places, rows))
    return state, table


def embedding_factor(embedding: Any) -> torch.Tensor:
    """What the rows of an embedding are multiplied by, rounded as the model's activations are."""
    factor = getattr(embedding, "factor", getattr(embedding, "scalar_embed_scale", 1.0))
    dtype = torch.bfloat16 if isinstance(embedding.weight, Packed) else embedding.weight.dtype
    return torch.tensor(factor, dtype=dtype).float()


def _positions(graph: Graph, inputs: Inputs) -> str:
    """The position of each new token in its row, (batch, tokens)."""
    tokens = graph.node("Gather", inputs.shape, graph.constant("second", np.array(1, np.int64)))
    last, total = (graph.node("Cast", value, to=INT64) for value in (inputs.last, inputs.total))
    after = graph.node("Sub", graph.node("Add", last, "one"), tokens)
    # a prompt's rows start at 0, those that are padded too
    past = graph.node("Where", graph.node("Equal", total, tokens), "first", after)
    new = graph.node("Range", "first", tokens, graph.constant("by", np.array(1, np.int64)))
    return graph.node("Add", graph.node("Unsqueeze", past, "one"), new)


def _head(decoder: Decoder, normed: str, table: Matrix) -> None:
    """Logits over the vocabulary and over labels, of the tokens from `logits_from` on."""
    graph, inputs, config = decoder.graph, decoder.inputs, decoder.config
    head: Any = decoder.model.get_output_embeddings()
    first = graph.input("logits_from", INT64, [1], np.zeros(1, np.int64))
    end = graph.constant("end", np.array([np.iinfo(np.int64).max]))
    kept = graph.node("Slice", graph.node("Reshape", normed, inputs.shape), first, end, "one")
    rows = graph.node("Reshape", kept, "rows")
    tied = head.weight is cast(Any, decoder.model.get_input_embeddings()).weight
    matrix = table if tied else store(graph, "head", [head.weight])
    biases = [] if getattr(head, "bias", None) is None else [floats(head.bias)]
    logits = product(graph, rows, matrix, biases)
    if (bound := getattr(config, "final_logit_softcapping", None)) is not None:
        graph.constant("bound", np.array(bound, np.float32))
        logits = graph.node("Mul", graph.node("Tanh", graph.node("Div", logits, "bound")), "bound")
    size = graph.constant("logits.width", np.array([matrix.shape[0]]))
    shape = graph.node("Concat", inputs.batch, "rest", size, axis=0)
    graph.node("Reshape", logits, shape, output="logits")
    graph.output("logits", FLOAT, ["batch", "kept", matrix.shape[0]])
    # a label head reads states of length one (adapters/learned.py)
    width = table.shape[1]
    labels = graph.input(HEAD, FLOAT, ["labels", width], np.zeros((0, width), np.float32))
    graph.constant("ones", np.ones(width, np.float32))
    unit = graph.node("SimplifiedLayerNormalization", kept, "ones", axis=-1, epsilon=EPSILON)
    graph.node("MatMul", unit, graph.node("Transpose", labels), output="label_logits")
    graph.output("label_logits", FLOAT, ["batch", "kept", "labels"])
