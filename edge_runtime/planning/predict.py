"""Predicts the peak memory of training from the model's facts alone; nothing is loaded.

    peak = runtime + kernels + weights + adapter + the largest of
           boundaries + activations + block      backward through a block
           boundaries + activations + loss       between forward and backward
           answers                 prompts are completed, after training, where the method exchanges completions
           encode                  what is sent is made

    runtime     a trainer that trained a model of almost nothing (measured once on the device, see `baseline`)
    kernels     what the matrix library builds and keeps for each length of rows that a run meets
    weights     frozen parameters kept, in their format; packed ones with the matrix that is expanded while it is used;
                streamed ones a block at a time
    adapter     6 B a parameter that is trained: factor in float32, two moments in 8 bits each; 4 B more where several
                micro-batches make a step, whose gradients are summed; 4 B one that is frozen
    boundaries  each block's input for the tokens of a micro-batch, as it is or in 8 bits
    activations of the blocks that do not run again: 5 rows as wide as the hidden states a token, 5 as wide as all heads and
                3 as wide as the MLP, and what the heap loses between them
    block       one block's activations and their gradients while it runs again, 17 hidden and 7 intermediate rows a token,
                and what the heap cannot reuse of them
    loss        the chunk of logits, what is made of it, and pieces of a packed head
    answers     keys and values of a micro-batch, and half of what a block takes in backward
    encode      what is sent and what it leaves behind, beside the factor, which becomes the latter

The factors were fitted to measured peaks; `make bench-peak` prints prediction beside measurement.
"""

import math

from edge_runtime.methods.interface import Method, name_of
from edge_runtime.models.facts import Facts, adapter_shapes
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning.plan import Plan
from edge_runtime.settings import PACKED, Role, Weights

MIB = 1 << 20
VALUE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "q8_0": 34 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32, "nf4": 0.516}
ADAPTER_BYTES, SUM_BYTES, FROZEN_BYTES, ENCODE_BYTES = 6, 4, 4, 9
KERNEL_BYTES, MOST_LENGTHS = 8 * MIB, 6  # of a length of rows; the library's cache holds that of so many
LOSS_CHUNK_BYTES = 8 * MIB  # of logits at once, unless memory is short
LOSS_COPIES = 2.6
HIDDEN_ROWS, INTERMEDIATE_ROWS = 17, 7  # a token, of a block's activations and their gradients
KEPT_HIDDEN_ROWS, KEPT_HEAD_ROWS, KEPT_INTERMEDIATE_ROWS = 5, 5, 3  # a token, of a block's activations alone
KEPT_COPIES = 1.2
BLOCK_COPIES = {"float32": 1.6, "bfloat16": 1.5, "packed": 1.8}
MLP_TOKENS, FEWER_MLP_TOKENS = 1024, 256  # that go through an MLP at once: at no cost, and where memory is short
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
    sent = sum(value for name, value in values.items() if method.exchanged(name))
    kept = facts.hidden + 4 if plan.boundaries == "int8" else width * facts.hidden
    copies = BLOCK_COPIES["packed" if plan.weights in PACKED else plan.weights]
    at_once = batch if facts.family in UNGATED_FAMILIES else min(batch, plan.mlp_tokens or batch)
    rows = batch * HIDDEN_ROWS * facts.hidden + at_once * INTERMEDIATE_ROWS * facts.intermediate
    joined = FROZEN_BYTES * adapter // plan.depth if method.low_rank is not None else 0  # a block's factors once more
    block = int(copies * width * rows) + 2 * joined  # and their gradients
    loss = int(LOSS_COPIES * min(width * batch * facts.vocabulary, loss_chunk_bytes(plan)))
    cache = 2 * facts.kv_heads * facts.head_dim * width * batch * plan.depth
    answers = {"answers": cache + block // 2 if method.completions is not None else 0}
    training = {"boundaries": batch * kept * (plan.depth - plan.kept_blocks)}
    if plan.kept_blocks:
        held = _activations(facts, batch, width, tiled=at_once < batch) + joined
        training["activations"] = plan.kept_blocks * held
        block = max(block - held, 0)  # the one that goes through backward is among them
    training |= {"block": block} if block > loss else {"loss": loss}
    encode = {"encode": ENCODE_BYTES * sent}
    return {
        "runtime": runtime_bytes,
        "kernels": KERNEL_BYTES * (1 + min(lengths, MOST_LENGTHS)),
        "weights": _weights(facts, 1 if plan.streamed else plan.depth, plan.weights),
        "adapter": factor_bytes * trained + FROZEN_BYTES * (adapter - trained),
        **max(training, answers, encode, key=lambda terms: sum(terms.values())),
    }


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
    values = KEPT_HIDDEN_ROWS * facts.hidden + KEPT_HEAD_ROWS * facts.heads * facts.head_dim
    values += 0 if tiled else intermediate * facts.intermediate
    return int(KEPT_COPIES * width * batch * values)


def _weights(facts: Facts, depth: int, weights: Weights) -> int:
    blocks, ends = depth * facts.block_parameters, facts.head_parameters
    if weights not in PACKED:
        return int(VALUE_BYTES[weights] * (blocks + ends))
    expanded = 2 * max(out * into for out, into in facts.linears.values())
    return int(VALUE_BYTES[weights] * blocks + VALUE_BYTES["q8_0"] * ends) + expanded
