"""Everything that depends on a model's family, one row each.

To add a family, add a row here and a case to tests/runtime/family_cases.py.

A configuration states some facts itself: activation, bound of the logits, factor of the embedding,
tied head, width of a head, sliding windows. The code that needs them reads the configuration.
Nothing here imports torch, because the planner reads the table in the agent's process.
"""

from typing import Any, Literal

import msgspec

from edge_runtime.errors import InputError
from edge_runtime.settings import Role

Paths = dict[Role, str]


RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}


class Keys(msgspec.Struct, frozen=True):
    """What the metadata of a family's GGUF files says besides what every family's does."""

    names: dict[str, str] = msgspec.field(default_factory=lambda: RMS)  # in the configuration
    missing: dict[str, Any] = {}  # values of keys that a file may lack; other keys are needed
    divisors: tuple[str, ...] = ()  # tensors that divide the rotary frequencies
    rotary: bool = True  # positions turn queries and keys
    partial_rotary: bool = False  # a head may be turned in a part of its width
    local_rotary: bool = False  # layers with a window have a rotary base of their own, and no scaling
    # layers in a period, the last of which has no window; 0: all have one; None: windows are not known
    period: int | None = None
    window: int = 0  # width where the file does not state one; 0: no window
    # layers of the model whose scores are scaled by hidden / heads in place of a head's width; 0: the
    # scale is not part of the configuration
    scaled_by_hidden: int = 0


class Family(msgspec.Struct, frozen=True):
    """One family of decoder models, as transformers and llama.cpp write it."""

    types: tuple[str, ...]  # `model_type` of its configurations; the first is the text model's
    classes: str  # how the names of its classes in transformers begin
    linears: Paths  # path of each linear layer inside a block, in the block's own order
    norm_offset: float = 0.0  # RMS norms multiply by weight + offset; GGUF files hold the sum
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # of a block, in order
    transposed: bool = False  # weights are stored (in, out), so they cannot be packed
    gguf: str | None = None  # architecture's name in GGUF files; None: these files are not read
    gguf_interleaved: bool = False  # rows of query and key heads are interleaved in GGUF files
    gguf_keys: Keys = Keys()
    # keys of config.json that are no fields of its class, but are read, or say what a field says
    read: tuple[str, ...] = ("head_dim",)
    unread: tuple[str, ...] = ()  # fields of its class that transformers' model does not compute with

    @property
    def norms_after(self) -> bool:
        """Whether norms also follow attention and MLP, which makes more activations a block."""
        return len(self.norms) == 4

    @property
    def mlp(self) -> Literal["gated", "fused", "plain"]:
        """The form of the MLP: gate and up apart, gate and up in one layer, or no gate."""
        return "gated" if "gate" in self.linears else "fused" if "gate_up" in self.linears else "plain"


SEPARATE: Paths = {role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")}
LLAMA: Paths = SEPARATE | {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
PHI: Paths = {**SEPARATE, "o": "self_attn.dense", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
PHI3: Paths = {
    "o": "self_attn.o_proj",
    "qkv": "self_attn.qkv_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
GPT2: Paths = {"qkv": "attn.c_attn", "o": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}

PARTIAL = ("head_dim", "partial_rotary_factor")
AFTER = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

# GGUF's side is llama.cpp's: conversion/*.py (permute, modify_tensors, set_gguf_parameters) writes the
# files, and load_arch_hparams in src/models/*.cpp says what a key means that is not there
DIVISORS = ("rope_factors_long.weight", "rope_factors_short.weight")
LLAMA_KEYS = Keys(divisors=("rope_freqs.weight", *DIVISORS))
GEMMA2_KEYS = Keys(
    names=RMS | {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
    missing={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    period=2,
    window=4096,
    scaled_by_hidden=46,
)
GEMMA3_KEYS = Keys(
    names=RMS | {"final_logit_softcapping": "final_logit_softcapping"},
    missing={"final_logit_softcapping": None},
    local_rotary=True,
    period=6,
    scaled_by_hidden=62,
)
GPT2_KEYS = Keys(
    names={"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"},
    rotary=False,
)
PHI_KEYS = Keys(names={"attention.layer_norm_epsilon": "layer_norm_eps"}, partial_rotary=True)
# llama.cpp itself passes over the window, which the published models have
PHI3_KEYS = Keys(divisors=DIVISORS, partial_rotary=True, period=0)
# special tokens of models with such a name swallow the spaces after them (llama.cpp's llama-vocab.cpp)
STRIPPED = ("phi-3", "phi3")
STRIPPED_EXCEPT = ("<unk>", "<s>", "<|endoftext|>")

FAMILIES = (
    Family(("llama",), "Llama", LLAMA, gguf="llama", gguf_interleaved=True, gguf_keys=LLAMA_KEYS),
    Family(("mistral",), "Mistral", LLAMA, gguf="llama", gguf_interleaved=True, gguf_keys=LLAMA_KEYS),
    Family(("qwen2",), "Qwen2", LLAMA, gguf="qwen2"),
    Family(("qwen3",), "Qwen3", LLAMA, gguf="qwen3"),
    Family(("gemma",), "Gemma", LLAMA, norm_offset=1.0, gguf="gemma"),
    Family(
        ("gemma2",),
        "Gemma2",
        LLAMA,
        norm_offset=1.0,
        norms=AFTER,
        gguf="gemma2",
        gguf_keys=GEMMA2_KEYS,
        read=("head_dim", "sliding_window_size"),
    ),
    Family(
        ("gemma3_text", "gemma3"),
        "Gemma3",
        LLAMA,
        norm_offset=1.0,
        norms=AFTER,
        gguf="gemma3",
        gguf_keys=GEMMA3_KEYS,
        read=("head_dim", "sliding_window_pattern"),
        unread=("attn_logit_softcapping",),
    ),
    Family(("phi",), "Phi", PHI, norms=("input_layernorm",), gguf="phi2", gguf_keys=PHI_KEYS, read=PARTIAL),
    Family(("phi3",), "Phi3", PHI3, gguf="phi3", gguf_keys=PHI3_KEYS, read=PARTIAL),
    Family(
        ("gpt2",),
        "GPT2",
        GPT2,
        norms=("ln_1", "ln_2"),
        transposed=True,
        gguf="gpt2",
        gguf_keys=GPT2_KEYS,
        read=(),
    ),
)


def family_of(model_type: str) -> Family:
    """The family of a configuration's `model_type`; raises InputError with the known types."""
    for family in FAMILIES:
        if model_type in family.types:
            return family
    types = ", ".join(name for family in FAMILIES for name in family.types)
    raise InputError(f"models of type {model_type} are not supported; known: {types}")
