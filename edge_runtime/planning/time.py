"""Predicts the seconds of an optimiser step from the model's facts and the device's measured rates.

    step = FLOP / rate of matrix products + bytes / rate of a large copy + calls

    FLOP    blocks: 2 a parameter and token, three times: forward, again in backward, and for dx.
            A block that is kept whole does not run again: twice.
            head over the vocabulary: twice, for the loss and its gradient, with every token
            labelled. A head over labels takes next to nothing.
            causal attention: at ATTENTION of the rate.
            adapter: nine products with A or B, at THIN of the rate: two forward, two again with
            the block, x A^T once more, two for dx, two for dA and dB.
    bytes   element-wise work on a block's activations and on the logits.
            matrices: three times a micro-batch, or twice; read, or expanded where they are packed.
            Streamed matrices are read besides. A packed head is expanded once.
    calls   starting a block's operations, once a micro-batch, and its factors' optimiser, once a
            step.

Nothing is loaded. Assumptions: rows are as long as the plan allows, slices as deep, a streamed file
is in the page cache, and with a head over labels all rows are for it. The constants were fitted to
steps of five settings on two cores of an AMD EPYC (SmolLM2-135M and the shape of Gemma-3-270M, 256
and 512 tokens a row, bfloat16 and q4_1). Predictions are within about a third of those, and of five
settings with a head (tests/runtime/planning/test_time.py). Nothing else was measured: no GPU, no
float32. `edge-runtime measure` shows prediction and measurement side by side.
"""

import msgspec

from edge_runtime.planning.predict import HIDDEN_ROWS, INTERMEDIATE_ROWS, VALUE_BYTES, Workload
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Role

ATTENTION, THIN = 0.25, 0.5  # shares of the rate of matrix products
BLOCK_PASSES = 10  # over the rows that predict.py counts in a block
LOSS_PASSES = 60  # over the logits
# Expanding a packed number takes as long as a copy that moves so many bytes.
EXPAND_BYTES = {"q8_0": 24, "q4_1": 60, "q4_0": 60, "nf4": 190}
CALL_S = 6e-3  # a block
MLP: tuple[Role, ...] = ("gate", "up", "gate_up", "down")


class Rates(msgspec.Struct, frozen=True):
    """Work that a device does in a second, as `edge_runtime.planning.probe` measures it."""

    bfloat16_flops: float  # FLOP of matrix products in bfloat16
    float32_flops: float  # FLOP of matrix products in float32
    copy_bytes: float  # bytes that a large copy reads and writes


def step_seconds(workload: Workload, plan: Plan, rates: Rates) -> float:
    """Predicted seconds of an optimiser step.

    Args:
        plan: its terms and seconds are not read.
        rates: of the device, with as many threads as the trainer has.
    """
    facts = workload.facts
    tokens, micro_batches = workload.rows_a_step * plan.tokens, -(-workload.rows_a_step // plan.rows)
    width, flops = (4, rates.float32_flops) if plan.weights == "float32" else (2, rates.bfloat16_flops)
    factors = sum(workload.factor_values(plan).values())
    blocks = plan.depth * facts.block_parameters
    mlps = plan.depth * sum(out * into for role, (out, into) in facts.linears.items() if role in MLP)
    # Half of all pairs of tokens; backward costs 2.5 times forward.
    attention = plan.depth * 1.5 * plan.tokens * facts.heads * facts.head_dim
    logits = 0 if workload.fleet.head is not None else facts.vocabulary  # of a token
    head = logits * facts.hidden
    runs = 3 - plan.kept_blocks / plan.depth
    if plan.tiled:  # MLPs in tiles run again in any case
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
    calls_s = CALL_S * plan.depth * (micro_batches + 1)
    pass_s = products / flops + moved / rates.copy_bytes + calls_s
    # a later round has no fewer passes than an earlier one
    return pass_s * len(workload.method.passes(workload.fleet.rounds))
