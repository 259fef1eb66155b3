"""A transformers configuration made of a GGUF file's metadata, every key of which is accounted for.

A key is read, or known to change nothing, or the file is refused by the name of the key. What a
family's files say of their own stands in the family's row (families.Keys). Keys outside the
architecture's own say how a file came about, or are the tokenizer's (gguf_tokenizer.py).
Sources: llama.cpp's load_hparams in src/llama-model.cpp and src/models/*.cpp, which read the files, and
conversion/*.py, which writes them.
"""

from typing import Any

from edge_runtime.errors import InputError
from edge_runtime.models import gguf_rotary
from edge_runtime.models.families import FAMILIES, Family
from edge_runtime.models.gguf_header import Contents
from edge_runtime.models.gguf_keys import Unread

NAMES = {  # in the configuration
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}
# widths of a head of the published models whose scores are scaled by `query_pre_attn_scalar`, which
# no key states: llama.cpp takes the width, transformers 256
SCALED_WIDTHS = (128, 256)


def family(contents: Contents) -> Family:
    """The family of a file's architecture; raises InputError where none of the table is of it."""
    architecture, kind = (contents.metadata.get(f"general.{key}") for key in ("architecture", "type"))
    if kind not in (None, "model"):
        raise InputError(f"{contents.files[0]} is of type {kind} (general.type), but has to be a model")
    for row in FAMILIES:
        if row.gguf and row.gguf == architecture:
            return row
    known = ", ".join(dict.fromkeys(row.gguf for row in FAMILIES if row.gguf))
    raise InputError(
        f"{contents.files[0]}: GGUF files of {architecture} (general.architecture) are not supported; known: {known}"
    )


def configuration(contents: Contents) -> Any:
    """The transformers configuration of a GGUF file.

    Raises:
        InputError: a key is missing, or has a value that is known not to be computed here, or is
            not known.
    """
    from transformers import CONFIG_MAPPING

    row, tensors = family(contents), contents.tensors
    keys = Unread.of(contents)
    if "token_embd.weight" not in tensors:
        raise InputError(f"{contents.files[0]} lacks the tensor token_embd.weight")
    settings: dict[str, Any] = {}
    for key, name in (NAMES | row.gguf_keys.names).items():
        if key in NAMES:
            settings[name] = keys.count(key)
            continue
        missing = row.gguf_keys.missing
        value = keys.take(key, missing[key]) if key in missing else keys.need(key)
        settings[name] = value or None  # 0: none
    embedding = tensors["token_embd.weight"].shape
    if embedding[1:] != (settings["hidden_size"],):
        keys.refuse("embedding_length", settings["hidden_size"], f"token_embd.weight is {embedding}")
    heads = keys.count("attention.head_count")
    width = keys.count("attention.key_length", settings["hidden_size"] // heads)
    if (values := keys.take("attention.value_length", width)) != width:
        keys.refuse("attention.value_length", values, f"values have to be as wide as keys ({width})")
    context = settings["max_position_embeddings"]
    settings |= {
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **_tokens(contents.metadata),
        **_window(keys, row, settings),
        **_scale(keys, row, settings, heads, width),
    }
    kind = CONFIG_MAPPING[row.types[0]]
    if row.gguf_keys.rotary:
        rotary = gguf_rotary.parameters(keys, row, context, width)
        settings["rope_parameters"] = rotary
        original = rotary.get("original_max_position_embeddings")
        if original and hasattr(kind, "original_max_position_embeddings"):
            settings["original_max_position_embeddings"] = original  # such a class prefers this one
    biases = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    settings |= {name: tensor in tensors for name, tensor in biases.items() if hasattr(kind, name)}
    keys.refuse_left()
    try:
        return kind(**settings)
    except Exception as error:  # transformers raises many kinds here
        reason = " ".join(str(error).split())
        raise InputError(
            f"{contents.files[0]}: its metadata gives no sound configuration: {reason}"
        ) from error


def _tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """Numbers of special tokens, as far as the file states them; the end of a turn ends a text too."""
    bos, pad, *ends = (
        metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", "eos", "eot", "eom")
    )
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": bos,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": pad,
    }


def _window(keys: Unread, row: Family, settings: dict[str, Any]) -> dict[str, Any]:
    """The width of sliding windows, and which layers have one."""
    period, layers = row.gguf_keys.period, settings["num_hidden_layers"]
    window = keys.take("attention.sliding_window", row.gguf_keys.window)
    if period is None:
        if 0 < window < settings["max_position_embeddings"]:
            keys.refuse("attention.sliding_window", window, "such a model has no windows here")
        return {}
    if not period:
        return {"sliding_window": window or None}
    pattern = keys.left.pop("attention.sliding_window_pattern", period)
    if not isinstance(pattern, tuple):
        pattern = [not pattern or layer % pattern < pattern - 1 for layer in range(layers)]
    if len(pattern) < layers:
        keys.refuse("attention.sliding_window_pattern", pattern, f"the model has {layers} layers")
    kinds = ["sliding_attention" if window and slides else "full_attention" for slides in pattern[:layers]]
    # transformers asks for a width even where no layer has a window
    return {"sliding_window": window or settings["max_position_embeddings"], "layer_types": kinds}


def _scale(keys: Unread, row: Family, settings: dict[str, Any], heads: int, width: int) -> dict[str, Any]:
    """What attention's scores are divided by the root of, where the configuration has it."""
    if not row.gguf_keys.scaled_by_hidden:
        return {}
    if width not in SCALED_WIDTHS:
        reason = f"the scale of attention, which no key states, is known for widths {SCALED_WIDTHS} alone"
        keys.refuse("attention.key_length", width, reason)
    is_scaled = settings["num_hidden_layers"] == row.gguf_keys.scaled_by_hidden
    return {"query_pre_attn_scalar": settings["hidden_size"] // heads if is_scaled else width}
