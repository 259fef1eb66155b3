"""The cases: each operator and a whole decoder layer, at the sizes of known models.

A case counts from the shapes what an ideal implementation reads, writes and computes: forward and
backward each read their operands once and write their results once. Bytes are those of bfloat16
activations, of weights in their format, and of float32 factors. A multiplication and an addition
count as two operations, an exponential as one.

    linear      2 M N K each for y and dx; 6 M r (N + K) for the adapter
    head        4 M V H; the head is read once, as a running softmax needs no second pass
    blocks      their linears, forward twice but for the last, as checkpointing demands; attention
    others      a few operations a value: the bytes count

Rivals that are not installed are left out. A rival that overwrites its arguments gets fresh ones
before each run.
"""

from collections.abc import Callable, Iterable, Iterator

from edge_kernels import quant

from benchmarks.kernels.cases.between import (
    attention_case,
    gated_activation_case,
    layer_norm_case,
    rms_norm_case,
    rotary_case,
)
from benchmarks.kernels.cases.blocks import adamw8bit_case, checkpoint_block_case, decoder_layer_case
from benchmarks.kernels.cases.case import Case, Counted, Shape
from benchmarks.kernels.cases.linear import adapter_linear_case, packed_linear_case
from benchmarks.kernels.cases.loss import linear_cross_entropy_case

OPERATORS: dict[str, tuple[tuple[str, ...], Callable[[Shape, int, str], Counted]]] = {
    "adapter_linear": (("dense", *quant.BLOCK), adapter_linear_case),
    "packed_linear": (tuple(quant.BLOCK), packed_linear_case),
    "linear_cross_entropy": (("dense", "q8_0", "q4_0"), linear_cross_entropy_case),
    "rms_norm": (("",), rms_norm_case),
    "layer_norm": (("",), layer_norm_case),
    "gated_activation": (("silu",), gated_activation_case),
    "rotary": (("",), rotary_case),
    "attention": (("",), attention_case),
    "AdamW8bit": (("",), adamw8bit_case),
    "checkpoint_block": (("",), checkpoint_block_case),
    "decoder_layer": (("",), decoder_layer_case),
}


def select(shapes: list[Shape], tokens: list[int], operators: Iterable[str] | None = None) -> Iterator[Case]:
    """All cases of some operators, of all if None; in this order: operator, kind, shape, tokens."""
    for operator in OPERATORS if operators is None else operators:
        kinds, make = OPERATORS[operator]
        for kind in kinds:
            for shape in shapes:
                for count in tokens if operator != "AdamW8bit" else [0]:
                    yield Case(operator, kind, shape, count, *make(shape, count, kind))
