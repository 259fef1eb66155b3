"""Facts of an architecture, read from its configuration alone: what planner, adapters and node need to know of a model.

Nothing here imports torch: the agent reads facts from the JSON that `edge_runtime.models.prepare` wrote once.
"""

from typing import Any

import msgspec

from edge_runtime.settings import Role


class Facts(msgspec.Struct, frozen=True):
    """One checkpoint.

    model_class: id and revision; only devices of one class share A and B.
    folder: configuration and tokenizer. weights: where the tensors are, a GGUF file or a folder of safetensors files; empty
    for random ones.
    linears: (out, in) of each linear layer of a block, by role. tokenizer_bytes: of the tokenizer's file.
    """

    model_class: str
    folder: str
    weights: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int
    tied_head: bool
    linears: dict[Role, tuple[int, int]]
    tokenizer_bytes: int = 0

    @property
    def block_parameters(self) -> int:
        """Parameters of one block, norms left out (they are a thousandth of it)."""
        return sum(out * into for out, into in self.linears.values())

    @property
    def head_parameters(self) -> int:
        """Parameters of the embedding, and of the head where it is not the same tensor."""
        return self.vocabulary * self.hidden * (1 if self.tied_head else 2)


def read(
    config: Any, linears: dict[Role, tuple[int, int]], *, model_class: str, folder: str, weights: str
) -> Facts:
    """Facts of a transformers configuration; names differ between families, optimum's NormalizedConfig levels them."""
    from optimum.utils.normalized_config import NormalizedTextConfigWithGQA

    text = config.get_text_config()
    named = NormalizedTextConfigWithGQA(text)
    heads = named.num_attention_heads
    return Facts(
        model_class=model_class,
        folder=folder,
        weights=weights,
        family=text.model_type,
        layers=named.num_layers,
        hidden=named.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or named.hidden_size // heads,
        intermediate=max(out for out, _ in linears.values()),
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
        tied_head=bool(config.tie_word_embeddings),
        linears=linears,
    )
