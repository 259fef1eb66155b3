"""Everything that depends on a model's family, one row each.

To add a family, add a row here and a case to tests/runtime/family_cases.py.

A configuration states some facts itself: activation, bound of the logits, factor of the embedding,
tied head, width of a head, sliding windows. The code that needs them reads the configuration.
Nothing here imports torch, because the planner reads the table in the agent's process.
"""

from typing import Literal

import msgspec

from edge_runtime.errors import InputError
from edge_runtime.settings import Role

Paths = dict[Role, str]


class Family(msgspec.Struct, frozen=True):
    """One family of decoder models, as transformers and llama.cpp write it."""

    types: tuple[str, ...]  # `model_type` of its configurations; the first is the text model's
    classes: str  # how the names of its classes in transformers begin
    linears: Paths  # path of each linear layer inside a block, in the block's own order
    norm_offset: float = 0.0  # RMS norms multiply by weight + offset; GGUF files hold the sum
    norms_after: bool = False  # norms also follow attention and MLP: more activations a block
    transposed: bool = False  # weights are stored (in, out), so they cannot be packed
    gguf: str | None = None  # architecture's name in GGUF files; None: these files are not read
    gguf_interleaved: bool = False  # rows of query and key heads are interleaved in GGUF files

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

# GGUF's side is llama.cpp's convert_hf_to_gguf.py: LlamaModel.permute, GemmaModel.modify_tensors
FAMILIES = (
    Family(("llama",), "Llama", LLAMA, gguf="llama", gguf_interleaved=True),
    Family(("mistral",), "Mistral", LLAMA, gguf="llama", gguf_interleaved=True),
    Family(("qwen2",), "Qwen2", LLAMA, gguf="qwen2"),
    Family(("qwen3",), "Qwen3", LLAMA, gguf="qwen3"),
    Family(("gemma",), "Gemma", LLAMA, norm_offset=1.0, gguf="gemma"),
    Family(("gemma2",), "Gemma2", LLAMA, norm_offset=1.0, norms_after=True, gguf="gemma2"),
    Family(("gemma3_text", "gemma3"), "Gemma3", LLAMA, norm_offset=1.0, norms_after=True, gguf="gemma3"),
    Family(("phi",), "Phi", PHI),
    Family(("phi3",), "Phi3", PHI3, gguf="phi3"),
    Family(("gpt2",), "GPT2", GPT2, transposed=True),
)


def family_of(model_type: str) -> Family:
    """The family of a configuration's `model_type`; raises InputError with the known types."""
    for family in FAMILIES:
        if model_type in family.types:
            return family
    types = ", ".join(name for family in FAMILIES for name in family.types)
    raise InputError(f"models of type {model_type} are not supported; known: {types}")
