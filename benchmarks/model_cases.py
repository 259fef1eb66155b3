"""Tiny random models of each family and their variants, for the table of what is read (models.py).

A case is a family and a variant. A variant changes the configuration in one respect that changes
what the model computes.
"""

from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Changes = dict[str, Any]  # fields of a configuration

TOKENS = 24  # of a sequence: more than the windows and the lengths before scaling below
SIZES: Changes = {
    "vocab_size": 96,
    "hidden_size": 256,  # a block of a K-quant
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# blocks in turn with a sliding window and without, which have rope settings of their own
MIXED = {**SIZES, "layer_types": ["sliding_attention", "full_attention"]}
# heads of published models, so that a GGUF file's scale of attention is known
MIXED |= {"head_dim": 128, "query_pre_attn_scalar": 128}
# of families whose heads are as wide as hidden_size allows
NARROW = {key: value for key, value in SIZES.items() if key != "head_dim"}
GPT2 = {"vocab_size": 96, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}

TIED: dict[str, Changes] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
}
WINDOW = {"sliding_window": 6}
QWEN_WINDOW = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
BIASES = {"attention_bias": True}


def _rope(width: int, **more: Any) -> dict[str, Changes]:
    """Each rope scaling of transformers. width: values of a head that are rotated."""
    factors = {"short_factor": [1.5] * (width // 2), "long_factor": [3.0] * (width // 2)}
    scalings: dict[str, Changes] = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "longrope": {"factor": 4.0, "original_max_position_embeddings": 16, **factors},
    }
    variants = {
        f"rope {kind}": {"rope_scaling": {"rope_type": kind, **scaling}, **more}
        for kind, scaling in scalings.items()
    }
    # begins where the sequence is longer than this
    variants["rope dynamic"]["max_position_embeddings"] = 16
    return variants


class Family(NamedTuple):
    """A family's sizes, and its variants by name."""

    sizes: Changes
    variants: dict[str, Changes]


CASES = {
    "llama": Family(SIZES, {**TIED, "biases": {**BIASES, "mlp_bias": True}, **_rope(16)}),
    "mistral": Family(SIZES, {**TIED, "window": WINDOW, **_rope(16, sliding_window=None)}),
    "qwen2": Family(NARROW, {**TIED, "window": QWEN_WINDOW, **_rope(64)}),
    "qwen3": Family(SIZES, {**TIED, "biases": BIASES, "window": QWEN_WINDOW, **_rope(16)}),
    "gemma": Family(SIZES, {**TIED, "biases": BIASES, **_rope(16)}),
    "gemma2": Family(
        MIXED,
        {
            **TIED,
            "biases": BIASES,
            "window": WINDOW,
            "softcaps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
            "no softcaps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
            "scale": {"query_pre_attn_scalar": 24},
            **_rope(128),
        },
    ),
    "gemma3_text": Family(
        MIXED,
        {
            **TIED,
            "biases": BIASES,
            "window": WINDOW,
            "scale": {"query_pre_attn_scalar": 24},
            **_rope(128),
        },
    ),
    "phi": Family(
        NARROW, {**TIED, "key norms": {"qk_layernorm": True}, **_rope(32, partial_rotary_factor=0.5)}
    ),
    "phi3": Family(
        NARROW,
        {
            **TIED,
            "window": WINDOW,
            "partial rotary": {"partial_rotary_factor": 0.5},
            "rope longrope": {**_rope(64)["rope longrope"], "original_max_position_embeddings": 16},
        },
    ),
    "gpt2": Family(
        GPT2,
        {
            **TIED,
            "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
            "no scale": {"scale_attn_weights": False},
        },
    ),
}


def build(family: str, variant: str) -> PreTrainedModel:
    """A model of a case in float32, equal in every run; all its weights and biases are random."""
    case = CASES[family]
    config = AutoConfig.for_model(family, **{**case.sizes, **case.variants[variant]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # a norm of zeros would hide what comes before it
        parameter.normal_(float("norm" in name or "ln_" in name), 0.2)
    return model


def ids() -> torch.Tensor:
    """Token ids (2, TOKENS) that no model knows as special."""
    return torch.randint(3, 96, (2, TOKENS), generator=torch.Generator().manual_seed(0))
