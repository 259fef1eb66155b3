"""Rotary frequencies as a GGUF file states them, for a configuration's `rope_parameters`.

    f_i = base^(-2i / turned) / (factor · divisor_i)    cosine and sine are multiplied by a factor too

Divisors are a tensor of the file: rope_freqs.weight for Llama 3, rope_factors_long and _short.weight
for Phi-3 with a long context. A configuration says each as "longrope".
Sources: llama.cpp's load_hparams in src/llama-model.cpp, llama_context in src/llama-context.cpp,
rope_yarn in ggml/src/ggml-cpu/ops.cpp; transformers' modeling_rope_utils.py.
"""

import math
from typing import Any

import numpy as np

from edge_runtime.errors import InputError
from edge_runtime.models.families import Family
from edge_runtime.models.gguf_keys import Unread

FREQUENCIES = "rope_freqs.weight"
FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


def parameters(keys: Unread, row: Family, context: int, width: int) -> dict[str, Any]:
    """The rotary parameters of a model.

    Args:
        keys: of the file; those that are read are taken from them.
        row: of the file's family.
        context: positions of the model.
        width: of a head.

    Raises:
        InputError: frequencies are scaled in a way that is not known here.
    """
    rotary: dict[str, Any] = {"rope_theta": keys.take("rope.freq_base", 10000.0)}
    turned = keys.count("rope.dimension_count", width)
    if turned > width:
        keys.refuse("rope.dimension_count", turned, f"a head has {width} values")
    if row.gguf_keys.partial_rotary:
        part = turned / width
        # transformers rounds the product down
        rotary["partial_rotary_factor"] = part if int(width * part) == turned else math.nextafter(part, 1.0)
    elif turned != width:
        keys.refuse("rope.dimension_count", turned, f"such a model turns heads in their whole width, {width}")
    rotary |= _scaling(keys, row, context)
    if not row.gguf_keys.local_rotary:
        return rotary
    local = {"rope_type": "default", "rope_theta": keys.take("rope.freq_base_swa", 10000.0)}
    return {"full_attention": rotary, "sliding_attention": local}


def _scaling(keys: Unread, row: Family, context: int) -> dict[str, Any]:
    divisors = {name: _values(keys, name) for name in row.gguf_keys.divisors if name in keys.contents.tensors}
    kind = keys.take("rope.scaling.type", "linear")  # a factor without a type is linear
    known = ["none", "linear", "yarn", *(["longrope"] if FACTORS[0] in divisors else [])]
    if kind not in known:
        keys.refuse("rope.scaling.type", kind, f"known for the tensors of this file are {', '.join(known)}")
    factor = keys.take("rope.scaling.factor", 0.0) or keys.left.get("rope.scale_linear", 0.0)
    keys.left.pop("rope.scale_linear", None)  # the key's name in older files
    factor = 1.0 if kind == "none" else factor or 1.0
    if kind == "yarn":
        if divisors:
            keys.refuse("rope.scaling.type", kind, f"the file has divisors too ({', '.join(divisors)})")
        return _yarn(keys, factor, context)
    if divisors:
        return _divided(keys, divisors, factor, context)
    keys.take("rope.scaling.original_context_length", context)  # nothing depends on it
    if (attention := keys.take("rope.scaling.attn_factor", 1.0)) != 1.0:
        keys.refuse("rope.scaling.attn_factor", attention, f"only 1 is supported where the type is {kind}")
    return {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _yarn(keys: Unread, factor: float, context: int) -> dict[str, Any]:
    if (extrapolation := keys.take("rope.scaling.yarn_ext_factor", 1.0)) != 1.0:
        keys.refuse("rope.scaling.yarn_ext_factor", extrapolation, "only 1 is supported")
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    attention = keys.take("rope.scaling.yarn_attn_factor", usual) * keys.take("rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.take("rope.scaling.original_context_length", context),
        "attention_factor": attention,
        "beta_fast": keys.take("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.take("rope.scaling.yarn_beta_slow", 1.0),
    }


def _divided(keys: Unread, divisors: dict[str, list[float]], factor: float, context: int) -> dict[str, Any]:
    if set(divisors) == set(FACTORS):
        short, long = (divisors[name] for name in FACTORS)
        # a file without these was written by a converter that did not know them
        original = keys.need("rope.scaling.original_context_length")
        attention = keys.need("rope.scaling.attn_factor")
    elif set(divisors) == {FREQUENCIES}:
        short = long = divisors[FREQUENCIES]
        original = keys.take("rope.scaling.original_context_length", context)
        attention = keys.take("rope.scaling.attn_factor", 1.0)
    else:
        raise InputError(
            f"{keys.contents.files[0]} has the tensors {', '.join(divisors)}: a model has {FREQUENCIES} alone, or "
            f"{' and '.join(FACTORS)}"
        )
    return {
        "rope_type": "longrope",
        "short_factor": [factor * divisor for divisor in short],
        "long_factor": [factor * divisor for divisor in long],
        "factor": max(context / original, 1.0),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _values(keys: Unread, name: str) -> list[float]:
    """The values of a small tensor in float32."""
    place = keys.contents.tensors[name]
    file = keys.contents.files[place.shard]
    if place.kind != 0:  # gguf.GGMLQuantizationType.F32
        raise InputError(f"{file}: {name} is not in float32, but divisors of rotary frequencies have to be")
    values: list[float] = np.fromfile(file, "<f4", math.prod(place.shape), offset=place.first).tolist()
    return values
