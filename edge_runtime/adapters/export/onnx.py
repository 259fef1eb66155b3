"""Exports a base model and what was learned on it to ONNX Runtime.

    model.onnx, model.onnx.data    the base as it was trained on, packed or not (onnx_model.py)
    adapter.onnx_adapter           what was learned, for `onnxruntime.LoraAdapter`
    genai_config.json              for onnxruntime-genai
    tokenizer.json, ...            the checkpoint's tokenizer

After it is written, the folder is loaded by ONNX Runtime, and its logits are compared with those
that the base and the adapter have in torch.
"""

import gc
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnxruntime
import torch
from edge_kernels import Packed, expand
from numpy.typing import NDArray
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import put_on
from edge_runtime.adapters.export import onnx_adapter, onnx_model
from edge_runtime.adapters.export.check import EXACT, ROUGH, Outputs, require
from edge_runtime.adapters.export.checkpoint import copy_tokenizer
from edge_runtime.adapters.export.onnx_graph import Graph, in_float32
from edge_runtime.adapters.export.onnx_session import MODEL, session
from edge_runtime.adapters.learned import Array, Learned
from edge_runtime.models import weights
from edge_runtime.models.facts import Facts
from edge_runtime.settings import Weights

ADAPTER, GENAI = "adapter.onnx_adapter", "genai_config.json"
PROBE = 24  # tokens at most whose logits are compared, the last four of them a step each
STEPS = 4


def to_onnx(learned: Learned, format: Weights, folder: Path) -> None:
    """Write the folder.

    Args:
        learned: its facts have the checkpoint's folder and weights (`learned.on`).
        format: of the base; a packed one keeps the blocks that training has had.
        folder: made here.

    Raises:
        InputError: the model cannot be written.
        EdgeError: the logits differ. In either case files may be there.
    """
    facts = learned.facts
    model = weights.load(facts, len(learned.layers), format)
    onnx_model.check(model)
    folder.mkdir(parents=True)
    write_base(model, facts.model_class, learned.layers, folder)
    onnx_adapter.write(learned, folder / ADAPTER)
    copy_tokenizer(learned, folder)
    genai = msgspec.json.encode(_genai(facts, model))
    (folder / GENAI).write_bytes(msgspec.json.format(genai) + b"\n")
    tokens = min(PROBE, onnx_model.positions(model.config.get_text_config()))
    ids = np.random.default_rng(0).integers(0, facts.vocabulary, tokens)
    plain = _torch_logits(model, ids)
    put_on(model, learned)
    truth = Outputs(plain, _torch_logits(model, ids))
    del model  # there is one model in memory at a time
    gc.collect()
    compare(folder, ids, truth)


def write_base(model: PreTrainedModel, model_class: str, layers: tuple[int, ...], folder: Path) -> None:
    """Write the graph and its weights, without an adapter.

    Args:
        model: as `weights.load` returns it.
        model_class: in the graph's metadata, with the layers and the positions of a sequence.
        layers: the blocks' numbers in the checkpoint.
        folder: which gets the files.
    """
    config = model.config.get_text_config()
    with Graph(folder) as graph:
        onnx_model.write(graph, model, layers)
        about = {"model_class": model_class, "layers": " ".join(map(str, layers))}
        graph.save(config.model_type, about | {"positions": str(onnx_model.positions(config))})


def _genai(facts: Facts, model: PreTrainedModel) -> dict[str, Any]:
    """The configuration of onnxruntime-genai (its docs/reference/config)."""
    config = model.config.get_text_config()
    positions = onnx_model.positions(config)
    cache = ("past_{}_names", "past_key_values.%d.{}"), ("present_{}_names", "present.%d.{}")
    inputs, outputs = (
        {key.format(part): name.format(part) for part in ("key", "value")} for key, name in cache
    )
    decoder = {
        "filename": MODEL,
        "head_size": facts.head_dim,
        "hidden_size": facts.hidden,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **inputs},
        "outputs": {"logits": "logits", **outputs},
        "session_options": {"log_id": "edge-runtime", "provider_options": []},
    }
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens = {name: token for name, token in tokens.items() if token is not None}
    return {
        "model": {
            "type": config.model_type,
            "context_length": positions,
            "vocab_size": facts.vocabulary,
            **tokens,
            "decoder": decoder,
        },
        "search": {"max_length": positions, "past_present_share_buffer": True},
    }


# --- the comparison


def compare(folder: Path, ids: NDArray[np.int64], truth: Outputs) -> None:
    """Compare the folder's logits with torch's: in float32, and with activations in int8 where it has them.

    Args:
        folder: that was written.
        ids: tokens.
        truth: torch's logits, a row for each token.

    Raises:
        EdgeError: they differ by more than rounding.
    """
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(folder / ADAPTER))
    for graph, bound in ((in_float32((folder / MODEL).read_bytes()), EXACT), (None, ROUGH)):
        runtime = session(folder, graph=graph)
        outputs = Outputs(*(onnx_logits(runtime, ids, each) for each in (None, adapter)))
        require(outputs, truth, bound, "ONNX Runtime")


def onnx_logits(
    runtime: onnxruntime.InferenceSession, ids: NDArray[np.int64], adapter: onnxruntime.LoraAdapter | None
) -> Array:
    """(tokens, vocabulary): of a prompt, then of single steps on its cache."""
    options, names = onnxruntime.RunOptions(), [output.name for output in runtime.get_outputs()]
    if adapter is not None:
        options.add_active_adapter(adapter)
    past = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in runtime.get_inputs()
        if entry.name.startswith("past")
    }
    logits, done = [], 0
    for piece in np.split(ids, range(len(ids) - STEPS, len(ids))):
        done += len(piece)
        feeds = {"input_ids": piece[None], "attention_mask": np.ones((1, done), np.int64), **past}
        values = dict(zip(names, runtime.run(names, feeds, options), strict=True))
        past = {name: values[name.replace("past_key_values", "present")] for name in past}
        logits.append(values["logits"][0])
    return np.concatenate(logits)


@torch.no_grad()
def _torch_logits(model: PreTrainedModel, ids: NDArray[np.int64]) -> Array:
    """(tokens, vocabulary), with activations in float32."""
    model.float()
    embedding, tokens = cast(Any, model.get_input_embeddings()), torch.from_numpy(ids)
    table = embedding.weight
    rows = expand(table.rows(tokens), torch.float32) if isinstance(table, Packed) else table[tokens]
    output = model(inputs_embeds=(rows * onnx_model.embedding_factor(embedding))[None])
    logits: Array = output.logits[0].float().numpy()
    return logits
