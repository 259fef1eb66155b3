"""A case: an operator at a model's sizes, its bytes and FLOPs, and its variants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

DTYPE = torch.bfloat16
OURS = "ours"
RANK, SCALE = 16, 2.0
SIZE = 2  # bytes of a bfloat16 value


class Shape(NamedTuple):
    """A model's sizes, as in its config."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    width: int  # of a head
    vocabulary: int
    layers: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of the seven linears of a layer."""
        queries, keys = self.heads * self.width, self.kv_heads * self.width
        attention = [(queries, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, queries)]
        return [*attention, *2 * [(self.intermediate, self.hidden)], (self.hidden, self.intermediate)]


SMALL = Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 30)
SHAPES = [
    Shape("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, 151936, 24),
    Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, 16),
    Shape("Llama-3.2-3B", 3072, 8192, 24, 8, 128, 128256, 28),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256, 32),
]


class Variant(NamedTuple):
    """One implementation of a case."""

    run: Callable[[], list[torch.Tensor]]  # forward and backward; returns results and gradients
    held_bytes: int = 0  # weights, factors and state between runs
    before: Callable[[], None] = lambda: None  # runs before each run, and is not timed


Variants: TypeAlias = dict[str, Variant]


@dataclass(frozen=True)
class Case:
    """An operator at a model's sizes."""

    operator: str
    kind: str  # of the weight or activation, or ""
    shape: Shape
    tokens: int  # 0 where the operator has none
    bytes: int  # that an ideal implementation moves
    flops: int
    prepare: Callable[[torch.device], Variants]  # makes the variants on a device


Counted: TypeAlias = tuple[int, int, Callable[[torch.device], Variants]]  # bytes, FLOPs, prepare
