"""What a folder's config.json says of the text model, and that nothing in it is left out.

transformers keeps a key that it does not know and computes without it. Such a key is refused, unless
its value means that it is off, or it is known to be without effect.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import InputError
from edge_runtime.models.checkpoint import WHOLE
from edge_runtime.models.families import FAMILIES, family_of

# private fields, places of tokens, lengths that a model was trained with, how a model is run
PATTERNS = re.compile(r"^_|token_(id|index)s?$|(max|seq).*_len(gth)?$|^is_.+_config$|cache|flash|version")
# how a model is run and what it returns, and what the prepared copy needs no more
RUN = {
    "_attn_implementation": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
DONE = ("auto_map", "quantization_config")
# keys of strings that say what is computed; strings of other keys are names and notes
COMPUTED = re.compile(
    r"norm|(^|_)(position|rope)|rotary|alibi|activation|act_fn|mlp|ffn|attention|bias", re.IGNORECASE
)
# no fields of configurations, but read by some families
READ = {key for family in FAMILIES for key in family.read}
WITHOUT_EFFECT = {
    *DONE,
    *("task_specific_params", "is_decoder", "add_cross_attention", "torchscript", "predict_special_tokens"),
    *("output_past", "unsloth_fixed", "transformers.js_config"),
    *("n_ctx", "n_positions"),  # other fields say the same
    "dual_chunk_attention_config",  # of another runtime, for sequences beyond max_position_embeddings
}
OFF: tuple[Any, ...] = (None, 0, 1, [], {})  # False is 0; 1 is the neutral factor
# what transformers reads of rope_parameters (rope_scaling in older files) by rope_type; finetuned is a note
ROTARY = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("short_factor", "long_factor"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
ALWAYS = ("rope_type", "type", "rope_theta", "finetuned")
SAME_TYPES = {"su": "longrope"}  # older names


def text_part(folder: Path, config: Any) -> Any:
    """The configuration of the text model alone, after a check of all that config.json says.

    Raises:
        InputError: as `check` does.
    """
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check(folder, config, stated)
    text = copy.deepcopy(config.get_text_config())
    if config.get_text_config() is not config:
        check(folder, text, stated.get("text_config") or {})
        text.tie_word_embeddings = config.tie_word_embeddings
        ends = {"bos_token_id", "eos_token_id", "pad_token_id"} & stated.keys()
        for key in ends:
            setattr(text, key, stated[key])
    for key, value in RUN.items():
        setattr(text, key, value)
    for key in DONE:
        if hasattr(text, key):
            delattr(text, key)
    return text


def check(folder: Path, config: Any, stated: dict[str, Any]) -> None:
    """Refuse a configuration with a key that is left out, or whose attention sees later tokens.

    Names and notes that transformers does not know are dropped from the configuration.

    Args:
        folder: named in messages.
        config: transformers' configuration.
        stated: config.json as it is.

    Raises:
        InputError: names the key and its value.
    """
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and not config.sliding_window:
        raise InputError(
            f"{folder}/config.json has layers with sliding_attention in layer_types, but no width in sliding_window: "
            "set the width, or full_attention for each layer"
        )
    row = family_of(config.model_type)
    known = {"model_type", *config.attribute_map, *row.read, *WITHOUT_EFFECT}
    for kind in type(config).__mro__:
        known.update(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    known -= {*row.unread}
    for key, value in stated.items():
        if key in known or PATTERNS.search(key):
            continue
        # transformers has taken in an older name for a field of another
        if key not in vars(config) and key not in READ:
            continue
        if key == "transformers_weights":
            raise InputError(
                f"config.json in {folder} names the file of the weights (transformers_weights), which is not read: "
                f"name the file {WHOLE}, and remove the key"
            )
        if isinstance(value, str) and not COMPUTED.search(key):
            delattr(config, key)
        else:
            _refuse_unless_off(folder, config, key, value)
    for key, value in _rotary_left_out(config, stated):
        _refuse_unless_off(folder, config, key, value)
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        raise InputError(
            f"config.json in {folder} lets each token see those after it (is_causal or "
            "use_bidirectional_attention): such a model cannot be trained to write text"
        )


def _rotary_left_out(config: Any, stated: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys about rotary positions that the model does not read, or that another key overrides."""
    rotary = getattr(config, "rope_parameters", None) or {}
    by_layer = [part for part in rotary.values() if isinstance(part, dict)]
    parts = by_layer or [rotary]
    for part in parts:
        kind = part.get("rope_type", "default")
        if kind not in ROTARY:
            yield "rope_parameters.rope_type", kind
        named = part.get("type") or kind
        if SAME_TYPES.get(named, named) != kind:
            yield "rope_parameters.type", named
        known = {*ALWAYS, *ROTARY.get(kind, part), *family_of(config.model_type).read}
        yield from ((f"rope_parameters.{key}", value) for key, value in part.items() if key not in known)
    if by_layer:
        others = ((key, value) for key, value in rotary.items() if not isinstance(value, dict))
        yield from ((f"rope_parameters.{key}", value) for key, value in others)
    for key in ("rope_theta", "partial_rotary_factor"):
        if stated.get(key) not in (None, *(part.get(key) for part in parts)):
            yield key, stated[key]
    if stated.get("rope_scaling") and stated.get("rope_parameters"):
        yield "rope_scaling beside rope_parameters", stated["rope_scaling"]


def _refuse_unless_off(folder: Path, config: Any, key: str, value: Any) -> None:
    if value is True or value not in OFF:
        raise InputError(
            f"config.json in {folder} sets {key} to {_short(value)}, which transformers' {config.model_type} "
            "leaves out, so the model may be another: give a checkpoint that needs no other code, or remove "
            "the key if the model was made without it"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
