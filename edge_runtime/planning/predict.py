"""Predicts the peak memory of training from the model's facts alone; nothing is loaded.

    peak = runtime + kernels + weights + adapter + the largest of
           boundaries + block      backward through a block
           boundaries + loss       between forward and backward
           encode                  what is sent is made, after training

    runtime     a trainer that trained a model of almost nothing (measured once on the device, see `baseline`)
    kernels     what the matrix library builds and keeps for the shapes that a long run meets
    weights     frozen parameters kept, in their format; packed ones with the matrix that is expanded while it is used
    adapter     10 B a parameter: factor and the state the round started from in float32, two moments in 8 bits each; 4 B
                more where several micro-batches make a step, whose gradients are summed
    boundaries  each block's input for the tokens of a micro-batch, as it is or in 8 bits
    block       one block's activations and their gradients while it runs again: 17 hidden and 7 intermediate rows a token
    loss        the chunk of logits and what is made of it, and the matrix library's own buffers; pieces of a packed head
    encode      13 B a parameter of the adapter: delta, payload, residual

The counts of copies were fitted to measured peaks; `make bench-peak` prints prediction beside measurement.
"""

from edge_runtime.models.facts import Facts, adapter_shapes
from edge_runtime.models.slices import kept_layers
from edge_runtime.settings import PACKED, Adapter, Boundaries, Weights

MIB = 1 << 20
VALUE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "q8_0": 34 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32, "nf4": 0.516}
ADAPTER_BYTES, SUM_BYTES, ENCODE_BYTES = 10, 4, 13
KERNEL_BYTES = 48 * MIB  # after 40 steps of rows of many lengths; a short run has fewer
LOSS_CHUNK_BYTES = 16 * MIB  # of logits, as the trainer has it
LOSS = {"float32": (6 * MIB, 1.5), "bfloat16": (22 * MIB, 2.8), "packed": (32 * MIB, 2.8)}  # always; times the chunk


def terms(
    facts: Facts,
    *,
    depth: int,
    weights: Weights,
    adapter: Adapter,
    rows: int,
    rows_a_step: int,
    tokens: int,
    boundaries: Boundaries,
    runtime_bytes: int,
) -> dict[str, int]:
    """Predicted bytes by what takes them; their sum is the predicted peak.

    Args:
        depth: layers kept. rows: micro-batch. tokens: longest sequence. boundaries: how a block's input is kept.
        runtime_bytes: the measured baseline of this device.
    """
    width = 4 if weights == "float32" else 2  # of activations
    batch = rows * tokens
    shapes = adapter_shapes(facts, kept_layers(depth, facts.layers), adapter.roles, adapter.rank)
    factor_bytes = ADAPTER_BYTES + (SUM_BYTES if rows < rows_a_step else 0)
    values = sum(rows_ * columns for rows_, columns in shapes.values())
    kept = facts.hidden + 4 if boundaries == "int8" else width * facts.hidden
    always, copies = LOSS["packed" if weights in PACKED else weights]
    block = width * batch * (17 * facts.hidden + 7 * facts.intermediate)
    loss = always + int(copies * min(width * batch * facts.vocabulary, LOSS_CHUNK_BYTES))
    training = {"boundaries": batch * kept * depth, **({"block": block} if block > loss else {"loss": loss})}
    encode = {"encode": ENCODE_BYTES * values}
    return {
        "runtime": runtime_bytes,
        "kernels": KERNEL_BYTES,
        "weights": _weights(facts, depth, weights),
        "adapter": factor_bytes * values,
        **max(training, encode, key=lambda terms: sum(terms.values())),
    }


def _weights(facts: Facts, depth: int, weights: Weights) -> int:
    blocks, ends = depth * facts.block_parameters, facts.head_parameters
    if weights not in PACKED:
        return int(VALUE_BYTES[weights] * (blocks + ends))
    expanded = 2 * max(out * into for out, into in facts.linears.values())
    return int(VALUE_BYTES[weights] * blocks + VALUE_BYTES["q8_0"] * ends) + expanded
