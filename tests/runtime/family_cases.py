"""A tiny random model of each family; a new row of the families' table needs a case here."""

from typing import NamedTuple

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large enough that every layer matters to the logits
}
# of families whose heads are as wide as hidden_size allows
NARROW = {key: value for key, value in SIZES.items() if key != "head_dim"}
GPT2_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
SEPARATE = {"q": (64, 32), "k": (32, 32), "v": (32, 32), "o": (32, 64)}
GATED = {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}


class Case(NamedTuple):
    """A tiny model of 4 blocks."""

    norms: int
    gates: int = 4  # MLPs with a gate
    linears: dict[str, tuple[int, int]] = SEPARATE | GATED  # (out, in)
    names: dict[str, str] = {  # the end of each linear layer's path
        role: f"{role}_proj" for role in ("q", "k", "v", "o", "gate", "up", "down")
    }
    sizes: dict[str, object] = SIZES
    packable: bool = True


CASES = {
    "llama": Case(9),
    "mistral": Case(9),
    "qwen2": Case(9),
    "qwen3": Case(9 + 8),
    "gemma": Case(9),
    "gemma2": Case(17),
    "gemma3_text": Case(17 + 8),
    "phi": Case(
        5,
        0,
        {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "fc1": (48, 32), "fc2": (32, 48)},
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense", "fc1": "fc1", "fc2": "fc2"},
        NARROW,
    ),
    "phi3": Case(
        9,
        4,
        {"o": (32, 32), "qkv": (64, 32), "gate_up": (96, 32), "down": (32, 48)},
        {"o": "o_proj", "qkv": "qkv_proj", "gate_up": "gate_up_proj", "down": "down_proj"},
        NARROW,
    ),
    "gpt2": Case(
        9,
        0,
        {"qkv": (96, 32), "o": (32, 32), "fc1": (128, 32), "fc2": (32, 128)},
        {"qkv": "attn.c_attn", "o": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"},
        GPT2_SIZES,
        packable=False,
    ),
}
