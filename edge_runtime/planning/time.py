"""Predicts the seconds of an optimiser step from the model's facts and the device's measured rates; nothing is loaded.

    step = FLOP / rate of matrix products + bytes / rate of a large copy + calls

    FLOP        blocks: 2 a parameter and token, three times: forward, again in backward, and for dx; twice where they do not
                run again; the vocabulary's head twice: for the loss and its gradient, with every token labelled; one over labels
                takes next to nothing
                causal attention, at ATTENTION of the rate
                adapter: nine products with A or B, at THIN of the rate: two forward, two again if the block is, x Aᵀ once
                more, two for dx, two for dA and dB
    bytes       element-wise work on a block's activations and on the logits
                matrices, three times a micro-batch, or twice: read, or expanded where they are packed; streamed ones are
                read besides; a packed head is expanded once
    calls       what starting a block's operations takes, once a micro-batch, and its factors' optimiser, once a step

Rows are taken to be as long as the plan allows, the slice as deep, and a streamed file to be in the page cache; where the fleet
has a head over labels, all rows to be for it. The constants were fitted to steps of five settings on two cores of an AMD EPYC
(SmolLM2-135M and Gemma-3-270M's shape, 256 and 512 tokens a row, bfloat16 and q4_1); a prediction is within about a third of
those, and of five with a head, which tests/runtime/test_time.py has. Nothing else was measured: no GPU, no float32.
`edge-runtime measure` shows prediction and measurement side by side.
"""

import msgspec

from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.planning.predict import HIDDEN_ROWS, INTERMEDIATE_ROWS, VALUE_BYTES, factor_values
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Role

ATTENTION, THIN = 0.25, 0.5  # of the rate of matrix products
BLOCK_PASSES, LOSS_PASSES = (10, 60)  # over the rows that predict.py counts in a block, and over the logits
EXPAND_BYTES = {
    "q8_0": 24,
    "q4_1": 60,
    "q4_0": 60,
    "nf4": 190,
}  # a value takes as long as a copy that moves so many
CALL_S = 6e-3  # a block
MLP: tuple[Role, ...] = ("gate", "up", "gate_up", "down")


class Rates(msgspec.Struct, frozen=True):
    """What a device does in a second (`edge_runtime.planning.probe`): FLOP of matrix products, by their type, and bytes that
    a large copy reads and writes."""

    bfloat16_flops: float
    float32_flops: float
    copy_bytes: float


def step_seconds(
    facts: Facts,
    plan: Plan,
    *,
    method: Method,
    roles: tuple[Role, ...],
    rows_a_step: int,
    rates: Rates,
    headed: bool,
) -> float:
    """Predicted seconds of an optimiser step.

    Args:
        plan: all but its terms and seconds.
        method: whose factors they are.
        roles: of the layers that the adapter is on.
        rates: of the device, with as many threads as the trainer has.
        headed: whether a head over labels learns the rows, and not the vocabulary's.
    """
    tokens, micro_batches = rows_a_step * plan.tokens, -(-rows_a_step // plan.rows)
    width, flops = (4, rates.float32_flops) if plan.weights == "float32" else (2, rates.bfloat16_flops)
    factors = sum(factor_values(facts, plan, roles, method).values())
    blocks = plan.depth * facts.block_parameters
    mlps = plan.depth * sum(
        facts.linears[role][0] * facts.linears[role][1] for role in MLP if role in facts.linears
    )
    attention = (
        plan.depth * 1.5 * plan.tokens * facts.heads * facts.head_dim
    )  # half of the pairs; backward 2.5 times
    logits = 0 if headed else facts.vocabulary  # a token
    head = logits * facts.hidden
    runs = 3 - plan.kept_blocks / plan.depth
    if plan.tiled:  # and then MLPs run again in any case
        runs += (3 - runs) * mlps / blocks
    products = tokens * (2 * runs * (blocks + attention / ATTENTION) + 4 * head)
    products += (3 + 2 * runs) * tokens * factors / THIN
    rows = plan.depth * (HIDDEN_ROWS * facts.hidden + INTERMEDIATE_ROWS * facts.intermediate)
    moved = width * tokens * (BLOCK_PASSES / 3 * runs * rows + LOSS_PASSES * logits)
    moved += runs * micro_batches * blocks * EXPAND_BYTES.get(plan.weights, width)
    if plan.weights in PACKED:
        moved += micro_batches * head * EXPAND_BYTES["q8_0"]
    if plan.streamed:
        moved += 3 * micro_batches * blocks * VALUE_BYTES[plan.weights]
    once = products / flops + moved / rates.copy_bytes + CALL_S * plan.depth * (micro_batches + 1)
    return once * len(method.passes(2))  # of a later round, which has no fewer than the first
