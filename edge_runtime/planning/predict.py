"""Predicts the peak memory of training from the model's facts alone; nothing is loaded.

    peak = runtime + kernels + adapter + the largest phase:
           backward through a block      weights + boundaries + activations + block
           between forward and backward  weights + boundaries + activations + loss
           completion of prompts         weights + answers, where the method exchanges completions
           encoding the delta            encode; the model is gone
           reading rows                  tokenizer; it is gone before the model comes

`Prediction` has the formula of each term. The factors were fitted to measured peaks;
`make bench-peak` prints prediction beside measurement.
"""

import msgspec

from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.planning.workload import Workload
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Weights

MIB = 1 << 20
# Bytes of a number in each format.
VALUE_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "q8_0": 34 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "nf4": 0.516,
}

# Rows are padded to multiples of LENGTH_STEP tokens.
LENGTH_STEP = 8
# Tokens that go through an MLP at once: at no cost in time, and where memory is short.
MLP_TOKENS, FEWER_MLP_TOKENS = 1024, 256

# The adapter: bytes of a trained parameter, of its gradient's sum, of a frozen one, and of one that
# is encoded.
TRAINED_BYTES, SUM_BYTES, FROZEN_BYTES, ENCODE_BYTES = 6, 4, 4, 9

# Kernels that the matrix library keeps: for each length of rows up to its cache's size, more for
# long rows, whose attention has more shapes of tiles; and for the loss, which has a shape for each
# number of labelled tokens where lengths vary.
KERNEL_BYTES, CACHED_LENGTHS = 8 * MIB, 6
LONG_TOKENS, LONG_BYTES = 256, 4 * MIB
VARIED_BYTES = 20 * MIB

# The tokenizer: times its file, less what the first step adds to the runtime; measured with 49,152
# and 262,144 tokens.
TOKENIZER_COPIES, FIRST_STEP_BYTES = 11, 36 * MIB

# Logits that exist at once, unless memory is short, and copies of them that the loss makes.
LOSS_CHUNK_BYTES = 8 * MIB
LOSS_COPIES = {"dense": 2.6, "packed": 1.9}

# A block that runs again: rows of numbers a token, in its MLP or in its attention; copies by the
# bytes of a number.
BLOCK_BYTES = 4 * MIB  # of any size: pieces of the optimiser's step
BLOCK_COPIES = {2: 1.05, 4: 0.75}
HIDDEN_ROWS, INTERMEDIATE_ROWS = 17, 7
ATTENTION_ROWS = 10

# A block whose activations are kept: rows a token, and the heap's loss between them.
KEPT_HIDDEN_ROWS, KEPT_HEAD_ROWS, KEPT_INTERMEDIATE_ROWS = 5, 5, 3
KEPT_COPIES = 1.2

NORM_ROWS = 8  # a token, where norms follow attention and MLP too


class Prediction(msgspec.Struct, frozen=True):
    """Predicted bytes of each term. A batch is a micro-batch's tokens; numbers have `width` bytes."""

    # A trainer that has trained a model of almost nothing, measured once on the device.
    runtime: int
    # KERNEL_BYTES, and again for each length of rows.
    kernels: int
    # A trained parameter: float32 and two moments of 8 bits, and the sum of gradients if
    # micro-batches share a step.
    adapter: int
    # Frozen parameters in their format. Packed: and the largest matrix expanded. Streamed: one
    # block of them.
    weights: int
    # batch x hidden numbers in width or 8 bits, of each block that runs again.
    boundaries: int
    # Of each block that runs once: batch x (5 hidden + 5 heads' + 3 intermediate) numbers.
    activations: int
    # batch x the larger of 17 hidden + 7 intermediate (MLP) and 10 hidden + 10 of queries, keys and
    # values (attention).
    block: int
    # The chunk of logits, what the loss makes of it, and pieces of a packed head.
    loss: int
    # Keys and values of a batch, and half of a block.
    answers: int
    # The delta and what rounding loses, beside the factor, which becomes the latter.
    encode: int
    # The tokenizer's file eleven times, less the first step, kernels and adapter, which come later.
    tokenizer: int

    def terms(self) -> dict[str, int]:
        """The terms of the largest phase that are above 0; their sum is the predicted peak."""
        training = {name: getattr(self, name) for name in ("weights", "boundaries", "activations")}
        training |= {"block": self.block} if self.block > self.loss else {"loss": self.loss}
        completion = {"weights": self.weights, "answers": self.answers}
        phases = (training, completion, {"encode": self.encode}, {"tokenizer": self.tokenizer})
        largest = max(phases, key=lambda phase: sum(phase.values()))
        always = {"runtime": self.runtime, "kernels": self.kernels, "adapter": self.adapter}
        return always | {name: size for name, size in largest.items() if size}


def predict(workload: Workload, plan: Plan, lengths: int) -> Prediction:
    """Predict the memory of a plan.

    Args:
        plan: its terms are not read.
        lengths: different lengths of rows in a run, after padding.
    """
    facts, method = workload.facts, workload.method
    width = 4 if plan.weights == "float32" else 2
    batch = plan.rows * plan.tokens
    values = workload.factor_values(plan)
    trained = sum(value for name, value in values.items() if method.factors[name].trained)
    sent = sum(value for name, value in values.items() if method.factors[name].exchanged)
    frozen = sum(values.values()) - trained
    # These methods join the factors of a block, beside the factors themselves.
    joined = FROZEN_BYTES * (trained + frozen) // plan.depth if method.kept else 0
    activations = _activations(facts, plan, batch, width) + joined
    block = _block(facts, plan, batch, width) + 2 * joined  # and their gradients
    kernels = KERNEL_BYTES + _kernels(plan, lengths)
    trained_bytes = TRAINED_BYTES + (SUM_BYTES if plan.rows < workload.rows_a_step else 0)
    adapter = trained_bytes * trained + FROZEN_BYTES * frozen
    boundary = facts.hidden + 4 if plan.boundaries == "int8" else width * facts.hidden  # of a token
    cache = 2 * facts.kv_heads * facts.head_dim * width * batch * plan.depth
    return Prediction(
        runtime=workload.runtime_bytes,
        kernels=kernels,
        adapter=adapter,
        weights=_weights(facts, 1 if plan.streamed else plan.depth, plan.weights),
        boundaries=batch * boundary * (plan.depth - plan.kept_blocks),
        activations=plan.kept_blocks * activations,
        # The kept block that goes through backward is among the activations.
        block=max(block - activations, 0) if plan.kept_blocks else block,
        loss=_loss(facts, plan, batch, width),
        answers=cache + block // 2 if method.answers is not None else 0,
        encode=ENCODE_BYTES * sent,
        tokenizer=max(TOKENIZER_COPIES * facts.tokenizer_bytes - FIRST_STEP_BYTES - kernels - adapter, 0),
    )


def loss_chunk_bytes(plan: Plan) -> int:
    """Bytes of logits that the trainer has at once."""
    return LOSS_CHUNK_BYTES // 2 if plan.streamed else LOSS_CHUNK_BYTES


def _kernels(plan: Plan, lengths: int) -> int:
    of_a_length = KERNEL_BYTES + (LONG_BYTES if plan.tokens > LONG_TOKENS else 0)
    return of_a_length * min(lengths, CACHED_LENGTHS) + (VARIED_BYTES if lengths > 1 else 0)


def _weights(facts: Facts, depth: int, weights: Weights) -> int:
    blocks, ends = depth * facts.block_parameters, facts.head_parameters
    if weights not in PACKED:
        return int(VALUE_BYTES[weights] * (blocks + ends))
    expanded = 2 * max(out * into for out, into in facts.linears.values())
    return int(VALUE_BYTES[weights] * blocks + VALUE_BYTES["q8_0"] * ends) + expanded


def _activations(facts: Facts, plan: Plan, batch: int, width: int) -> int:
    """Bytes that a block keeps for backward when it does not run again."""
    ungated = family_of(facts.family).mlp == "plain"
    intermediate = INTERMEDIATE_ROWS if ungated else KEPT_INTERMEDIATE_ROWS
    if _tile(facts, plan, batch) < batch:  # an MLP in tiles runs again in any case
        intermediate = 0
    hidden = (KEPT_HIDDEN_ROWS + _norm_rows(facts)) * facts.hidden
    heads = KEPT_HEAD_ROWS * facts.heads * facts.head_dim
    return int(KEPT_COPIES * width * batch * (hidden + heads + intermediate * facts.intermediate))


def _block(facts: Facts, plan: Plan, batch: int, width: int) -> int:
    """Bytes of a block's activations and their gradients while it runs again."""
    tile = _tile(facts, plan, batch)
    mlp = batch * HIDDEN_ROWS * facts.hidden + tile * INTERMEDIATE_ROWS * facts.intermediate
    heads = (facts.heads + 2 * facts.kv_heads) * facts.head_dim
    attention = batch * ATTENTION_ROWS * (facts.hidden + heads)
    norms = batch * _norm_rows(facts) * facts.hidden
    return BLOCK_BYTES + int(BLOCK_COPIES[width] * width * (norms + max(mlp, attention)))


def _loss(facts: Facts, plan: Plan, batch: int, width: int) -> int:
    chunk = min(width * batch * facts.vocabulary, loss_chunk_bytes(plan))
    return int(LOSS_COPIES["packed" if plan.weights in PACKED else "dense"] * chunk)


def _tile(facts: Facts, plan: Plan, batch: int) -> int:
    """Tokens that go through an MLP at once; only a gated MLP runs in tiles."""
    return batch if family_of(facts.family).mlp == "plain" else min(batch, plan.mlp_tokens or batch)


def _norm_rows(facts: Facts) -> int:
    return NORM_ROWS if family_of(facts.family).norms_after else 0
