"""Predicts the peak memory of training from the model's facts alone; nothing is loaded.

    peak = runtime + kernels + adapter + the largest of
           weights + boundaries + activations + block      backward through a block
           weights + boundaries + activations + loss       between forward and backward
           weights + answers       prompts are completed, after training, where the method exchanges completions
           encode                  what is sent is made; the model is gone
           tokenizer               rows are read; it is gone before the model comes, and kernels and adapter are not there yet

    runtime     a trainer that trained a model of almost nothing (measured once on the device, see `baseline`)
    kernels     what the matrix library builds and keeps for each length of rows that a run meets; long ones have more shapes,
                of attention's tiles, and where lengths vary the loss has a shape for each number of labelled tokens
    adapter     6 B a parameter that is trained: factor in float32, two moments in 8 bits each; 4 B more where several
                micro-batches make a step, whose gradients are summed; 4 B one that is frozen
    weights     frozen parameters kept, in their format; packed ones with the matrix that is expanded while it is used;
                streamed ones a block at a time
    boundaries  each block's input for the tokens of a micro-batch, as it is or in 8 bits
    activations of the blocks that do not run again: 5 rows as wide as the hidden states a token, 5 as wide as all heads and
                3 as wide as the MLP, and what the heap loses between them
    block       one block's activations and their gradients while it runs again: in its MLP 17 hidden and 7 intermediate rows a
                token, or in its attention 10 hidden ones and 10 of queries, keys and values
    loss        the chunk of logits, what is made of it, and pieces of a packed head
    answers     keys and values of a micro-batch, and half of what a block takes in backward
    encode      what is sent and what it leaves behind, beside the factor, which becomes the latter
    tokenizer   vocabulary and merges, eleven times its file, less what of the runtime's own comes with the first step

Where norms follow attention and MLP too, they are 8 more hidden rows a token (measured with Gemma 3).
The factors were fitted to measured peaks; `make bench-peak` prints prediction beside measurement.
"""

import math

from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol.keys import name_of
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Role, Weights

MIB = 1 << 20
VALUE_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "q8_0": 34 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "nf4": 0.516,
}
ADAPTER_BYTES, SUM_BYTES, FROZEN_BYTES, ENCODE_BYTES = 6, 4, 4, 9
TOKENIZER_COPIES, FIRST_STEP_BYTES = (11, 36 * MIB)  # of its file; measured with 49,152 and 262,144 tokens
KERNEL_BYTES, MOST_LENGTHS = (8 * MIB, 6)  # of a length of rows; the library's cache holds that of so many
LONG_TOKENS, LONG_BYTES = 256, 4 * MIB  # rows of more than so many: that much more
VARIED_BYTES = 20 * MIB  # of the loss, where rows are of several lengths
LOSS_CHUNK_BYTES = 8 * MIB  # of logits at once, unless memory is short
LOSS_COPIES = {"dense": 2.6, "packed": 1.9}
BLOCK_BYTES = 4 * MIB  # of any size: pieces of the optimiser's step
BLOCK_COPIES = {2: 1.05, 4: 0.75}  # by the bytes of a value
HIDDEN_ROWS, INTERMEDIATE_ROWS = (17, 7)  # a token, of a block's activations and their gradients, in its MLP
ATTENTION_ROWS = 10  # the same in its attention, of each kind
KEPT_HIDDEN_ROWS, KEPT_HEAD_ROWS, KEPT_INTERMEDIATE_ROWS = (
    5,
    5,
    3,
)  # a token, of a block's activations alone
KEPT_COPIES = 1.2
NORMED_FAMILIES, NORM_ROWS = (("gemma2", "gemma3", "gemma3_text"), 8)  # norms after attention and MLP too
MLP_TOKENS, FEWER_MLP_TOKENS = (
    1024,
    256,
)  # that go through an MLP at once: at no cost, and where memory is short
UNGATED_FAMILIES = ("gpt2", "phi")  # their MLPs do not come in tiles
LENGTH_STEP = 8  # rows are padded to multiples of it


def terms(
    facts: Facts,
    plan: Plan,
    *,
    method: Method,
    roles: tuple[Role, ...],
    rows_a_step: int,
    lengths: int,
    runtime_bytes: int,
) -> dict[str, int]:
    """Predicted bytes by what takes them; their sum is the predicted peak.

    Args:
        plan: all but its terms.
        method: what it trains, freezes and sends.
        roles: of the layers that the adapter is on.
        lengths: of rows that a run meets, after padding.
        runtime_bytes: the measured baseline of this device.
    """
    width = 4 if plan.weights == "float32" else 2  # of activations
    batch = plan.rows * plan.tokens
    factor_bytes = ADAPTER_BYTES + (SUM_BYTES if plan.rows < rows_a_step else 0)
    values = factor_values(facts, plan, roles, method)
    adapter = sum(values.values())
    trained = sum(value for name, value in values.items() if method.factors[name].trained)
    sent = sum(value for name, value in values.items() if method.factors[name].exchanged)
    kept = facts.hidden + 4 if plan.boundaries == "int8" else width * facts.hidden
    at_once = batch if facts.family in UNGATED_FAMILIES else min(batch, plan.mlp_tokens or batch)
    norms = batch * _norm_rows(facts) * facts.hidden
    mlp = batch * HIDDEN_ROWS * facts.hidden + at_once * INTERMEDIATE_ROWS * facts.intermediate
    attention = batch * ATTENTION_ROWS * (facts.hidden + (facts.heads + 2 * facts.kv_heads) * facts.head_dim)
    joined = (
        FROZEN_BYTES * adapter // plan.depth if method.joins_factors else 0
    )  # a block's factors once more
    values_at_once = norms + max(mlp, attention)
    block = (
        BLOCK_BYTES + int(BLOCK_COPIES[width] * width * values_at_once) + 2 * joined
    )  # and their gradients
    chunk = min(width * batch * facts.vocabulary, loss_chunk_bytes(plan))
    loss = int(LOSS_COPIES["packed" if plan.weights in PACKED else "dense"] * chunk)
    cache = 2 * facts.kv_heads * facts.head_dim * width * batch * plan.depth
    weights = {"weights": _weights(facts, 1 if plan.streamed else plan.depth, plan.weights)}
    answers = {"answers": cache + block // 2} if method.answers is not None else {}
    training = weights | {"boundaries": batch * kept * (plan.depth - plan.kept_blocks)}
    if plan.kept_blocks:
        held = _activations(facts, batch, width, tiled=at_once < batch) + joined
        training["activations"] = plan.kept_blocks * held
        block = max(block - held, 0)  # the one that goes through backward is among them
    training |= {"block": block} if block > loss else {"loss": loss}
    of_a_length = KERNEL_BYTES + (LONG_BYTES if plan.tokens > LONG_TOKENS else 0)
    of_loss = VARIED_BYTES if lengths > 1 else 0
    always = {
        "runtime": runtime_bytes,
        "kernels": KERNEL_BYTES + of_a_length * min(lengths, MOST_LENGTHS) + of_loss,
        "adapter": factor_bytes * trained + FROZEN_BYTES * (adapter - trained),
    }
    not_yet = FIRST_STEP_BYTES + always["kernels"] + always["adapter"]
    tokenizer = {"tokenizer": max(TOKENIZER_COPIES * facts.tokenizer_bytes - not_yet, 0)}
    ways = (training, weights | answers, {"encode": ENCODE_BYTES * sent}, tokenizer)
    return always | max(ways, key=lambda terms: sum(terms.values()))


def factor_values(facts: Facts, plan: Plan, roles: tuple[Role, ...], method: Method) -> dict[str, int]:
    """Values of each of the adapter's factors, over all layers."""
    values = dict.fromkeys(method.factors, 0)
    shapes = adapter_shapes(facts, kept_layers(plan.depth, facts.layers), roles, plan.rank, method)
    for key, shape in shapes.items():
        values[name_of(key)] += math.prod(shape)
    return values


def loss_chunk_bytes(plan: Plan) -> int:
    """Of logits that the trainer has at once."""
    return LOSS_CHUNK_BYTES // 2 if plan.streamed else LOSS_CHUNK_BYTES


def _activations(facts: Facts, batch: int, width: int, *, tiled: bool) -> int:
    """What a block keeps for backward of so many tokens; an MLP in tiles runs again in any case."""
    intermediate = INTERMEDIATE_ROWS if facts.family in UNGATED_FAMILIES else KEPT_INTERMEDIATE_ROWS
    values = (
        KEPT_HIDDEN_ROWS + _norm_rows(facts)
    ) * facts.hidden + KEPT_HEAD_ROWS * facts.heads * facts.head_dim
    values += 0 if tiled else intermediate * facts.intermediate
    return int(KEPT_COPIES * width * batch * values)


def _norm_rows(facts: Facts) -> int:
    return NORM_ROWS if facts.family in NORMED_FAMILIES else 0


def _weights(facts: Facts, depth: int, weights: Weights) -> int:
    blocks, ends = depth * facts.block_parameters, facts.head_parameters
    if weights not in PACKED:
        return int(VALUE_BYTES[weights] * (blocks + ends))
    expanded = 2 * max(out * into for out, into in facts.linears.values())
    return int(VALUE_BYTES[weights] * blocks + VALUE_BYTES["q8_0"] * ends) + expanded
