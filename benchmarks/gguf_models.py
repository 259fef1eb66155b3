"""Writes a transformers model as a GGUF file as llama.cpp does, for the table of what is read (models.py).

Keys and tensors are those of its converter, also where llama.cpp itself passes over a key: a file
says all that the configuration says. Matrices are rounded as by its quantiser, simplified for the
K-quants: blocks of the same layout, whose scales are found in one step.
Sources: llama.cpp's conversion/*.py, tools/quantize, and ggml/src/ggml-quants.c.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

Kind = gguf.GGMLQuantizationType
# architectures by model_type
ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2")},
    **{"mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2"},
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in GPT-2
# where a row is not of whole blocks
FALLBACK = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]


def write(
    model: PreTrainedModel,
    path: Path,
    kind: Kind = Kind.F32,
    vocabulary: dict[str, Any] | None = None,
    tensors_a_file: int = 0,
) -> Path:
    """Write a model; its matrices are of a kind, other tensors in float32.

    Args:
        vocabulary: keys of the tokenizer; None: of bytes that are merged once.
        tensors_a_file: of a model that is split over files, whose names are made from the path's; 0:
            it is not split.
    """
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=tensors_a_file)
    tensors = _keys(writer, model, architecture)
    for key, value in (vocabulary or _bytes(config)).items():
        writer.add_key_value(f"tokenizer.{key}", value, _type_of(value), _item_type(value))
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        inner, values = known.get_name(name, try_suffixes=(".weight", ".bias")) or name, value.float().numpy()
        if architecture == "llama" and (heads := _turned_heads(inner, config)):
            shape = values.shape
            values = values.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)
        if architecture == "gpt2" and name.endswith(CONV1D):
            values = values.T
        if architecture.startswith("gemma") and inner.endswith("norm.weight"):
            values = values + 1
        tensors[inner] = values
    for name, values in tensors.items():
        held = kind_of(values, kind)
        blocks = quantise(np.ascontiguousarray(values, np.float32), held)
        writer.add_tensor(name, blocks, raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model: PreTrainedModel, kind: Kind) -> PreTrainedModel:
    """The model with the values that a file of this kind has."""
    for name, parameter in model.named_parameters():
        value = parameter.T if model.config.model_type == "gpt2" and name.endswith(CONV1D) else parameter
        values = np.ascontiguousarray(value.numpy())
        held = kind_of(values, kind)
        value.copy_(torch.from_numpy(gguf.quants.dequantize(quantise(values, held), held).astype(np.float32)))
    return model


def kind_of(values: NDArray[np.float32], kind: Kind) -> Kind:
    """The kind that a tensor is held in: matrices in this one where their rows are of whole blocks."""
    if values.ndim < 2:
        return Kind.F32
    return kind if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else FALLBACK[kind]


def quantise(values: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """Blocks of rows: (rows, bytes of a row), or numbers of a kind without blocks."""
    own = {Kind.Q4_K: _q4_k, Kind.Q6_K: _q6_k}.get(kind)
    if own is None:
        blocks: NDArray[Any] = gguf.quants.quantize(values, kind)
        return blocks
    return own(values.reshape(-1, 256)).reshape(*values.shape[:-1], -1)


def _q4_k(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """w = d · s · q - e · m: 8 parts of 32 values, each with 6-bit s and m; q of 4 bits."""
    parts = x.reshape(-1, 8, 32)
    least = np.maximum(-parts.min(-1), 0)
    scale = (parts.max(-1) + least) / 15
    d, e = ((each.max(-1, keepdims=True) / 63).astype(np.float16) for each in (scale, least))
    s, m = (_levels(each, unit, 63) for each, unit in ((scale, d), (least, e)))
    step, low = (each * unit.astype(np.float32) for each, unit in ((s, d), (m, e)))
    q = _levels(parts + low[..., None], step[..., None], 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    s, m = s.astype(np.uint8), m.astype(np.uint8)
    high = [each[:, :4] | (each[:, 4:] >> 4) << 6 for each in (s, m)]
    packed = [*high, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4]
    quants = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([d.view(np.uint8), e.view(np.uint8), *packed, quants], -1)


def _q6_k(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """w = d · s · (q - 32): 16 parts of 16 values, each with an 8-bit s; q of 6 bits."""
    parts = x.reshape(-1, 16, 16)
    scale = np.abs(parts).max(-1) / 31
    d = (scale.max(-1, keepdims=True) / 127).astype(np.float16)
    s = _levels(scale, d, 127)
    signed = _levels(parts, s[..., None] * d.astype(np.float32)[..., None], 31, -32)
    q = (signed + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate(
        [(q[:, :, 0] & 15) | (q[:, :, 2] & 15) << 4, (q[:, :, 1] & 15) | (q[:, :, 3] & 15) << 4], -1
    )
    high = sum((q[:, :, part] >> 4) << 2 * part for part in range(4)).astype(np.uint8)
    parts_ = [low.reshape(-1, 128), high.reshape(-1, 64), s.astype(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts_, -1)


def _levels(values: NDArray[Any], unit: NDArray[Any], most: int, least: int = 0) -> NDArray[Any]:
    """How many units a value is, to the nearest level."""
    unit = unit.astype(np.float32)
    return np.clip(np.rint(np.divide(values, unit, out=np.zeros_like(values), where=unit != 0)), least, most)


def _turned_heads(inner: str, config: Any) -> int:
    """Heads whose rows the converter interleaves."""
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
        inner.split(".")[-2], 0
    )


def _keys(
    writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: str
) -> dict[str, NDArray[np.float32]]:
    """Write the architecture's keys; returns the rotary divisors that are tensors."""
    c = model.config
    heads = c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // heads
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(getattr(c, "intermediate_size", None) or 4 * c.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(c, "num_key_value_heads", heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(c.vocab_size)
    if hasattr(c, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(c, "layer_norm_eps", None) or c.layer_norm_epsilon)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if hasattr(c, name):
            writer.add_float32(f"{architecture}.{name}", getattr(c, name) or 0.0)
    if architecture in ("gemma2", "gemma3") and c.query_pre_attn_scalar != width:
        writer.add_attention_scale(1 / math.sqrt(c.query_pre_attn_scalar))
    if getattr(c, "scale_attn_by_inverse_layer_idx", False) or not getattr(c, "scale_attn_weights", True):
        writer.add_attention_scale(1.0)
    kinds = getattr(c, "layer_types", None) or []
    if getattr(c, "sliding_window", None) and ("sliding_attention" in kinds or not kinds):
        writer.add_sliding_window(c.sliding_window)
    if architecture == "gemma3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    return _rotary(writer, model, architecture, width) if hasattr(c, "rope_parameters") else {}


def _rotary(writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: str, width: int) -> dict[str, Any]:
    rotary = model.config.rope_parameters
    whole = rotary.get("full_attention", rotary)
    writer.add_rope_freq_base(whole["rope_theta"])
    turned = int(width * (whole.get("partial_rotary_factor") or 1.0))
    if "sliding_attention" in rotary:
        writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
    if architecture in ("llama", "phi2", "phi3"):
        writer.add_rope_dimension_count(turned)
    kind, context = whole["rope_type"], model.config.max_position_embeddings
    if kind in ("linear", "yarn", "longrope", "dynamic"):
        writer.add_string(f"{architecture}.rope.scaling.type", kind)
    if kind in ("linear", "yarn", "dynamic"):
        writer.add_rope_scaling_factor(whole["factor"])
    if original := whole.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "longrope":
        factor = whole.get("factor") or context / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        factors = {name: np.asarray(whole[f"{name}_factor"], np.float32) for name in ("long", "short")}
        return {f"rope_factors_{name}.weight": values for name, values in factors.items()}
    if kind == "llama3":
        plain = 1.0 / whole["rope_theta"] ** (torch.arange(0, turned, 2) / turned)
        held = model.base_model.rotary_emb
        scaled = getattr(held, "full_attention_inv_freq", None)
        return {"rope_freqs.weight": (plain / (held.inv_freq if scaled is None else scaled)).numpy()}
    return {}


def _bytes(config: Any) -> dict[str, Any]:
    """Keys of a tokenizer as small as the configuration's vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *ALPHABET[: config.vocab_size - 4], "ab"]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.token_type": [2, 3, 3, *[1] * (len(tokens) - 3)],
        "ggml.merges": ["a b"],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
    }


def _type_of(value: Any) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)


def _item_type(value: Any) -> gguf.GGUFValueType | None:
    return gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
