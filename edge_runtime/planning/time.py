"""Predicts the seconds of an optimiser step from the model's facts and the device's measured rates; nothing is loaded.

    step = (blocks + head) / matmul rate + (adapter) / (THIN · matmul rate)
           + bytes moved / copy rate + calls

    blocks      2 FLOP a parameter and token, three times: forward, again in backward, and for dx; causal attention beside them
    head        three products of the vocabulary; every token is taken to be labelled
    adapter     4.5 products of each factor and token: two forward, two again, x Aᵀ once more, two for dx, two for dA and dB
    bytes       element-wise work on a block's activations and on the logits; packed matrices, expanded three times a
                micro-batch; streamed ones, read three times; the factors' moments
    calls       what starting a block's operations takes, whatever their size

Rows are taken to be as long as the plan allows, and the slice as deep. The constants were fitted on two cores of one CPU (AMD
EPYC, SmolLM2-135M and Gemma-3-270M's shape, 64 to 512 tokens); there a prediction is within about a third of the measured
median. `edge-runtime measure` shows both. GPUs were not measured, and a file is taken to be in the page cache.
"""

import msgspec

from edge_runtime.models.facts import Facts, adapter_shapes
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.predict import VALUE_BYTES
from edge_runtime.settings import PACKED, Role

THIN = 0.35  # of the matmul rate, in products with an adapter's factor
BLOCK_PASSES, LOSS_PASSES = 6.0, 12.0  # over what the formula counts of a block's rows, and over the logits
EXPAND_BYTES = {"q8_0": 4.0, "q4_1": 16.0, "q4_0": 16.0, "nf4": 40.0}  # a value: a copy of so many takes as long
STEP_BYTES = 100  # of copies, a trained parameter
CALL_S = 1e-3  # a block and micro-batch


class Rates(msgspec.Struct, frozen=True):
    """What a device does in a second (`edge_runtime.planning.probe`): FLOP of matrix products, by their type, and bytes that
    a large copy reads and writes."""

    bfloat16_flops: float
    float32_flops: float
    copy_bytes: float


def step_seconds(facts: Facts, plan: Plan, *, roles: tuple[Role, ...], rows_a_step: int, rates: Rates) -> float:
    """Predicted seconds of an optimiser step.

    Args:
        plan: all but its terms and seconds.
        roles: of the layers that the adapter is on.
        rates: of the device, with as many threads as the trainer has.
    """
    tokens, micro_batches = rows_a_step * plan.tokens, -(-rows_a_step // plan.rows)
    width, flops = (4, rates.float32_flops) if plan.weights == "float32" else (2, rates.bfloat16_flops)
    shapes = adapter_shapes(facts, kept_layers(plan.depth, facts.layers), roles, plan.rank)
    factors = sum(rows * columns for rows, columns in shapes.values())
    blocks = plan.depth * facts.block_parameters
    attention = (
        1.5 * plan.tokens * plan.depth * facts.heads * facts.head_dim
    )  # half of the pairs, and 2.5 times in backward
    head = facts.vocabulary * facts.hidden
    products = 6 * tokens * (blocks + attention + head) + 9 * tokens * factors / THIN
    rows = plan.depth * (17 * facts.hidden + 7 * facts.intermediate)
    moved = width * tokens * (BLOCK_PASSES * rows + LOSS_PASSES * facts.vocabulary) + STEP_BYTES * factors
    if plan.weights in PACKED:
        read = VALUE_BYTES[plan.weights] if plan.streamed else 0
        moved += 3 * micro_batches * blocks * (EXPAND_BYTES[plan.weights] + read)
        moved += 3 * micro_batches * head * EXPAND_BYTES["q8_0"]
    return products / flops + moved / rates.copy_bytes + CALL_S * micro_batches * plan.depth
