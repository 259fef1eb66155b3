"""Predicts the peak memory of training from the model's facts alone; nothing is loaded.

    peak = runtime + tokenizer + weights + adapter + boundaries + block + loss

    runtime     a trainer that trained a model of almost nothing (measured once on the device, see `baseline`)
    tokenizer   vocabulary · 960 B, what a Hugging Face tokenizer holds a token
    weights     frozen parameters kept, in their format
    adapter     20 B a parameter: factor, gradient and two Adam moments in float32, and the state the round started from
    boundaries  each block's input for the tokens of a micro-batch
    block       one block's activations and their gradients while it runs again: 20 hidden and 8 intermediate rows a token
    loss        the chunk of float32 logits twice: logits and their exponentials; in bfloat16 half a chunk more, rounded

The counts of copies were fitted to measured peaks; `make bench-peak` prints prediction beside measurement.
"""

from edge_runtime.models.facts import Facts, adapter_shapes
from edge_runtime.models.slices import kept_layers
from edge_runtime.settings import WEIGHT_BYTES, Adapter, Weights

MIB = 1 << 20
TOKENIZER_BYTES = 960
ADAPTER_BYTES = 20
LOSS_CHUNK_BYTES = 32 * MIB  # the operator's default
LOSS_CHUNKS = {"float32": 2.0, "bfloat16": 2.5}


def terms(
    facts: Facts, *, depth: int, weights: Weights, adapter: Adapter, rows: int, tokens: int, runtime_bytes: int
) -> dict[str, int]:
    """Predicted bytes by what takes them; their sum is the predicted peak.

    Args:
        depth: layers kept. rows: micro-batch. tokens: longest sequence.
        runtime_bytes: the measured baseline of this device.
    """
    width = WEIGHT_BYTES[weights]
    batch = rows * tokens
    shapes = adapter_shapes(facts, kept_layers(depth, facts.layers), adapter.roles, adapter.rank)
    return {
        "runtime": runtime_bytes,
        "tokenizer": TOKENIZER_BYTES * facts.vocabulary,
        "weights": width * (depth * facts.block_parameters + facts.head_parameters),
        "adapter": ADAPTER_BYTES * sum(rows_ * columns for rows_, columns in shapes.values()),
        "boundaries": width * batch * facts.hidden * depth,
        "block": width * batch * (20 * facts.hidden + 8 * facts.intermediate),
        "loss": int(LOSS_CHUNKS[weights] * min(4 * batch * facts.vocabulary, LOSS_CHUNK_BYTES)),
    }
