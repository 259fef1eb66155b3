"""A transformers configuration made of a GGUF file's metadata, every key of which is accounted for.

A key is read, or known to change nothing, or the file is refused by the name of the key. What a
family's files say of their own stands in the family's row (families.Keys). Keys outside the
architecture's own say how a file came about, or are the tokenizer's (gguf_tokenizer.py).

Rotary frequencies: f_i = base^(-2i/width) / (factor · divisor_i), and cosine and sine times an
attention factor. Divisors are a tensor of the file: Llama 3's are in rope_freqs.weight, the long and
short ones of Phi-3 in rope_factors_*.weight. A configuration says both as "longrope".
Sources: llama.cpp's load_hparams in src/llama-model.cpp and src/models/*.cpp, rope_yarn in
ggml/src/ggml-cpu/ops.cpp, and conversion/*.py, which writes the files.
"""

import math
from typing import Any, NamedTuple, NoReturn

import numpy as np

from edge_runtime.errors import InputError
from edge_runtime.models.families import FAMILIES, Family
from edge_runtime.models.gguf_header import Contents
from edge_runtime.models.headers import Place

NAMES = {  # in the configuration
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}
# keys that change nothing where they have this value; None: whatever they have. Of the latter,
# pooling is of text embeddings, vocab_size is less exact than the embedding's own rows, and the
# data layout is the origin's.
NEUTRAL = {
    "vocab_size": None,
    "tensor_data_layout": None,
    "pooling_type": None,
    "rope.scaling.finetuned": None,
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
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
    keys = _Keys.of(contents)
    if "token_embd.weight" not in tensors:
        raise InputError(f"{contents.files[0]} lacks the tensor token_embd.weight")
    settings = {name: keys.need(key) for key, name in NAMES.items()}
    for key, name in row.gguf_keys.names.items():
        settings[name] = (
            keys.take(key, row.gguf_keys.missing[key]) if key in row.gguf_keys.missing else keys.need(key)
        )
    heads = keys.need("attention.head_count")
    width = keys.take("attention.key_length", settings["hidden_size"] // heads)
    if (values := keys.take("attention.value_length", width)) != width:
        keys.refuse("attention.value_length", values, f"values have to be as wide as keys ({width})")
    settings |= {
        "num_attention_heads": heads,
        "num_key_value_heads": keys.take("attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **_tokens(contents.metadata),
        **_window(keys, row, settings),
        **_scale(keys, row, settings, heads, width),
        **_rotary(keys, row, contents, settings["max_position_embeddings"], width),
    }
    kind = CONFIG_MAPPING[row.types[0]]
    original = settings["rope_parameters"].get("original_max_position_embeddings")
    if original and hasattr(kind, "original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = original  # such a class prefers this one
    biases = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    settings |= {name: tensor in tensors for name, tensor in biases.items() if hasattr(kind, name)}
    keys.refuse_unread()
    return kind(**settings)


class _Keys(NamedTuple):
    """An architecture's keys that nobody has taken yet."""

    contents: Contents
    prefix: str
    left: dict[str, Any]

    @classmethod
    def of(cls, contents: Contents) -> "_Keys":
        prefix = f"{contents.metadata['general.architecture']}."
        pairs = contents.metadata.items()
        return cls(contents, prefix, {k.removeprefix(prefix): v for k, v in pairs if k.startswith(prefix)})

    def take(self, key: str, missing: Any) -> Any:
        """The value of a key, of which a list of equal values is one."""
        value = self.left.pop(key, missing)
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                self.refuse(key, value, "all layers have to be equal")
            return value[0]
        return value

    def need(self, key: str) -> Any:
        if key not in self.left:
            raise InputError(f"{self.contents.files[0]} lacks the key {self.prefix}{key}")
        return self.take(key, None)

    def refuse(self, key: str, value: Any, reason: str) -> NoReturn:
        raise InputError(f"{self.contents.files[0]} has {self.prefix}{key} = {value}, but {reason}")

    def refuse_unread(self) -> None:
        """Refuse the first key that is not known to change nothing."""
        for key, value in self.left.items():
            if key not in NEUTRAL:
                self.refuse(key, value, "it is not known what this key changes in such a model")
            if NEUTRAL[key] not in (None, value):
                self.refuse(key, value, f"only {NEUTRAL[key]} is supported")


def _tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """Numbers of special tokens, as far as the file states them; turns too may end a text."""
    ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding")}
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    end = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": ids["bos_token_id"], "eos_token_id": end, "pad_token_id": ids["padding_token_id"]}


def _window(keys: _Keys, row: Family, settings: dict[str, Any]) -> dict[str, Any]:
    """The width of sliding windows, and which layers have one."""
    period, layers = row.gguf_keys.period, settings["num_hidden_layers"]
    if period is None:
        return {}
    window = keys.take("attention.sliding_window", row.gguf_keys.window)
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


def _scale(keys: _Keys, row: Family, settings: dict[str, Any], heads: int, width: int) -> dict[str, Any]:
    """What attention's scores are divided by the root of, where the configuration has it."""
    if not row.gguf_keys.scaled_by_hidden:
        return {}
    if width not in SCALED_WIDTHS:
        reason = f"the scale of attention, which no key states, is known for widths {SCALED_WIDTHS} alone"
        keys.refuse("attention.key_length", width, reason)
    is_scaled = settings["num_hidden_layers"] == row.gguf_keys.scaled_by_hidden
    return {"query_pre_attn_scalar": settings["hidden_size"] // heads if is_scaled else width}


def _rotary(keys: _Keys, row: Family, contents: Contents, context: int, width: int) -> dict[str, Any]:
    """Rotary frequencies: the base, the part of a head that is turned, and their scaling."""
    rotary: dict[str, Any] = {"rope_theta": keys.take("rope.freq_base", 10000.0)}
    turned = keys.take("rope.dimension_count", width)
    if row.gguf_keys.partial_rotary:
        part = turned / width
        # transformers rounds the product down
        rotary["partial_rotary_factor"] = part if int(width * part) == turned else math.nextafter(part, 1.0)
    elif turned != width:
        keys.refuse(
            "rope.dimension_count", turned, f"heads of such a model are turned in their whole width, {width}"
        )
    rotary |= _scaling(keys, row, contents, context)
    if not row.gguf_keys.local_rotary:
        return {"rope_parameters": rotary}
    local = {"rope_type": "default", "rope_theta": keys.take("rope.freq_base_swa", 10000.0)}
    return {"rope_parameters": {"full_attention": rotary, "sliding_attention": local}}


def _scaling(keys: _Keys, row: Family, contents: Contents, context: int) -> dict[str, Any]:
    """The scaling of rotary frequencies, as a configuration's `rope_parameters` say it."""
    kind = keys.take("rope.scaling.type", "linear")  # a factor without a type is linear
    factors = [keys.take(key, 0.0) for key in ("rope.scaling.factor", "rope.scale_linear")]
    factor = next((given for given in factors if given), 1.0) if kind != "none" else 1.0
    divisors = {
        name: _numbers(contents, contents.tensors[name])
        for name in row.gguf_keys.divisors
        if name in contents.tensors
    }
    long, short = (divisors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if (long is None) != (short is None):
        raise InputError(
            f"{contents.files[0]} has one of the tensors rope_factors_long and _short: both are needed"
        )
    if kind not in ("none", "linear", "yarn", "longrope") or (kind == "longrope" and not long):
        keys.refuse(
            "rope.scaling.type",
            kind,
            "known are none, linear, yarn, and longrope with tensors rope_factors_*",
        )
    if long and short:
        # a file without these was not written by a converter that knew what they mean
        original, attention = (
            keys.need("rope.scaling.original_context_length"),
            keys.need("rope.scaling.attn_factor"),
        )
    else:
        long = short = divisors.get("rope_freqs.weight")
        original = keys.take("rope.scaling.original_context_length", context)
        attention = keys.take("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        if long:
            keys.refuse("rope.scaling.type", kind, "divisors of the frequencies cannot be scaled once more")
        return _yarn(keys, factor, original, attention)
    if long and short:
        scaled = {
            "long_factor": [factor * value for value in long],
            "short_factor": [factor * value for value in short],
        }
        return {
            **{
                "rope_type": "longrope",
                "attention_factor": attention,
                "factor": max(context / original, 1.0),
            },
            **{"original_max_position_embeddings": original, **scaled},
        }
    if attention != 1.0:
        keys.refuse("rope.scaling.attn_factor", attention, f"only 1 is supported where the scaling is {kind}")
    return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {"rope_type": "default"}


def _yarn(keys: _Keys, factor: float, original: int, attention: float) -> dict[str, Any]:
    """YaRN; transformers and llama.cpp know it by the same numbers."""
    if (extrapolation := keys.take("rope.scaling.yarn_ext_factor", 1.0)) != 1.0:
        keys.refuse("rope.scaling.yarn_ext_factor", extrapolation, "only 1 is supported")
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention * keys.take("rope.scaling.yarn_attn_factor", usual),
        "beta_fast": keys.take("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.take("rope.scaling.yarn_beta_slow", 1.0),
    }


def _numbers(contents: Contents, place: Place) -> list[float]:
    """The values of a small tensor in float32."""
    file = contents.files[place.shard]
    if place.kind != 0:
        raise InputError(f"{file}: divisors of the rotary frequencies have to be in F32")
    values: list[float] = np.fromfile(file, "<f4", math.prod(place.shape), offset=place.first).tolist()
    return values
