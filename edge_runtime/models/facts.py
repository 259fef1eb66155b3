"""Facts of a checkpoint for planner, adapters and node, read from its configuration alone.

Nothing here imports torch: the agent reads facts from the JSON file that `prepare` writes once.
"""

from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.models import hub
from edge_runtime.settings import Role


class Facts(msgspec.Struct, frozen=True):
    """One checkpoint on this device."""

    model_class: str  # name@revision; only devices of one class share A and B
    folder: str  # configuration and tokenizer
    weights: str  # a GGUF file or a folder of safetensors files; empty: drawn at random
    family: str  # the configuration's model_type
    layers: int
    hidden: int  # values a token between blocks
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # outputs of the widest linear layer
    vocabulary: int
    positions: int  # tokens a sequence may have
    tied_head: bool  # the head is the embedding's tensor
    linears: dict[Role, tuple[int, int]]  # (out, in) of each linear layer of a block
    blocks: str  # path of the list of blocks in the model, such as model.layers
    tokenizer_bytes: int = 0  # size of tokenizer.json

    @property
    def block_parameters(self) -> int:
        """Parameters of one block without its norms, which are a thousandth."""
        return sum(out * into for out, into in self.linears.values())

    @property
    def source(self) -> str:
        """Where others find the checkpoint: a hub id with its revision, or the path on this device."""
        return hub.id_of(Path(self.weights)) or self.weights

    @property
    def head_parameters(self) -> int:
        """Parameters of the embedding, and of the head where it has a tensor of its own.

        Without the head's bias, which is less than a thousandth.
        """
        return self.vocabulary * self.hidden * (1 if self.tied_head else 2)


def read(
    config: Any,
    linears: dict[Role, tuple[int, int]],
    blocks: str,
    *,
    model_class: str,
    folder: str,
    weights: str,
) -> Facts:
    """The facts in a transformers configuration, whose field names optimum makes equal.

    linears and blocks: fields of Facts that only the model shows.
    """
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
        blocks=blocks,
    )
