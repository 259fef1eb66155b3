"""Predicts the peak memory of training from the model's facts alone; nothing is loaded.

    peak = runtime + kernels + adapter + the largest phase:
           backward through a block      weights + boundaries + activations + block
           between forward and backward  weights + boundaries + activations + loss
           features, maps into the frame weights + frame, where models share one (methods/frames.py)
           completion of prompts         weights + answers, where the method exchanges completions
           start of a head's rows        weights + inputs, where labels have a head
           encoding the delta            encode; the model is gone
           reading rows                  tokenizer; it is gone before the model comes

The factors were fitted to measured peaks; `make bench-peak` prints prediction beside measurement.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from edge_runtime import methods
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol.keys import parse
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Fleet

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

# The adapter: bytes of a trained parameter (float32 and two moments of 8 bits), of its gradient's
# sum, of a frozen one, and of one that is encoded.
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

# Branches that depend on the token: copies of a hidden unit that backward needs (before and after
# GELU, its gate, their product), and what they take with their gradients.
UNIT_COPIES, BRANCH_COPIES = 4, 2

# Activations of the public texts that are in memory at once while maps into the frame are made.
FRAME_BYTES = 64 * MIB
# Copies of the states, and squares of their smaller side, that their singular vectors take; squares of
# a layer's width that its map takes. Measured with 500 to 3,000 texts and widths of 576 to 2,048.
SVD_COPIES, SVD_SQUARES, SOLVE_SQUARES = 10, 13, 6

MOST_ROWS = 512  # of a device's own whose head inputs are in memory at once, beside those of public texts

NORM_ROWS = 8  # a token, where norms follow attention and MLP too


class Serving(NamedTuple):
    """What a server beside the trainer may be asked, and whether ONNX Runtime can answer."""

    context: int = 2048  # tokens of a prompt and its answer together
    parallel: int = 2  # answers that are written at once
    onnx_bytes: int = 0  # measured baseline of a server with it; 0: it is not used
    unserved: Mapping[str, str] = MappingProxyType({})  # why it cannot serve a model, by model class


@dataclass(frozen=True)
class Workload:
    """What all plans of a model share: how a fleet trains the model on this device."""

    fleet: Fleet
    facts: Facts
    runtime_bytes: int  # measured baseline of the device
    serving: Serving | None = None  # what a server beside the trainer may be asked; None: there is none
    _values: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict, compare=False)

    @cached_property
    def method(self) -> Method:
        """The fleet's method, with its head and distillation."""
        return methods.build(self.fleet.method, self.fleet.head, self.fleet.public, self.fleet.codistill)

    @property
    def rows_a_step(self) -> int:
        """Rows of a step, public texts included."""
        codistill = self.fleet.codistill
        return self.fleet.training.rows_a_step + (codistill.rows if codistill else 0)

    def factor_values(self, plan: Plan) -> dict[str, int]:
        """Numbers in each of the adapter's factors, over all layers."""
        cached = self._values.get((plan.depth, plan.rank))  # many plans share both
        if cached is not None:
            return cached
        values = dict.fromkeys(self.method.factors, 0)
        layers = kept_layers(plan.depth, self.facts.layers)
        shapes = adapter_shapes(self.facts, layers, self.fleet.adapter.roles, plan.rank, self.method)
        for key, shape in shapes.items():
            values[parse(key).factor] += math.prod(shape)
        self._values[plan.depth, plan.rank] = values
        return values


def predict(workload: Workload, plan: Plan, lengths: int | None = None) -> dict[str, int]:
    """Predict the memory of a plan, whose terms are not read.

    Args:
        lengths: different lengths of rows in a run, after padding; None: all up to the plan's.

    Returns:
        Bytes of the terms of the largest phase that are above 0; their sum is the peak.
    """
    facts, method = workload.facts, workload.method
    width = 4 if plan.weights == "float32" else 2  # bytes of a number in the activations
    batch = plan.rows * plan.tokens  # tokens of a micro-batch
    values = workload.factor_values(plan)
    trained = sum(value for name, value in values.items() if method.factors[name].trained)
    sent = sum(value for name, value in values.items() if method.factors[name].exchanged)
    frozen = sum(values.values()) - trained
    # These methods join the factors of a block, beside the factors themselves.
    joined = FROZEN_BYTES * (trained + frozen) // plan.depth if method.kept or method.inner is not None else 0
    branches, copies = _branches(workload, plan, batch)
    kept = _kept_block(facts, plan, batch, width) + joined + branches
    block = block_bytes(facts, plan, batch, width) + copies
    block += 2 * joined + BRANCH_COPIES * branches  # and their gradients
    kernels = _kernels(plan, lengths or -(-plan.tokens // LENGTH_STEP))
    # Micro-batches that share a step add up their gradients.
    trained_bytes = TRAINED_BYTES + (SUM_BYTES if plan.rows < workload.rows_a_step else 0)
    adapter = trained_bytes * trained + FROZEN_BYTES * frozen
    weights = weights_bytes(facts, plan)
    boundary = facts.hidden + 4 if plan.boundaries == "int8" else width * facts.hidden  # of a token
    training = {
        "weights": weights,
        "boundaries": batch * boundary * (plan.depth - plan.kept_blocks),
        "activations": plan.kept_blocks * kept,
    }
    # The kept block that goes through backward is among the activations.
    again = max(block - kept, 0) if plan.kept_blocks else block
    chunk = min(width * batch * facts.vocabulary, loss_chunk_bytes(plan))
    loss = int(LOSS_COPIES["packed" if plan.weights in PACKED else "dense"] * chunk)
    training |= {"block": again} if again > loss else {"loss": loss}
    # Keys and values of a micro-batch, and half of a block.
    cache = 2 * facts.kv_heads * facts.head_dim * width * batch * plan.depth
    answers = cache + block // 2 if method.answers is not None else 0
    inputs = _inputs(workload) + block // 2 if workload.fleet.head is not None else 0
    # The first step's code, kernels and adapter come after the tokenizer is gone.
    tokenizer = TOKENIZER_COPIES * facts.tokenizer_bytes - FIRST_STEP_BYTES - kernels - adapter
    phases: tuple[dict[str, int], ...] = (
        training,
        {"weights": weights, "answers": answers},
        {"weights": weights, "inputs": inputs},
        {
            "weights": weights,
            "frame": _frame(workload, plan, FROZEN_BYTES * frozen) + block // 2 if method.framed else 0,
        },
        # The delta and what rounding loses, beside the factor, which becomes the latter.
        {"encode": ENCODE_BYTES * sent},
        {"tokenizer": tokenizer},
    )
    largest = max(phases, key=lambda phase: sum(phase.values()))
    always = {"runtime": workload.runtime_bytes, "kernels": kernels, "adapter": adapter}
    return always | {name: size for name, size in largest.items() if size}


def _branches(workload: Workload, plan: Plan, batch: int) -> tuple[int, int]:
    """Bytes that branches which depend on the token keep in a block, and of one layer's input and output; in float32."""
    method, roles = workload.method, workload.fleet.adapter.roles
    if method.branch is None:
        return 0, 0
    widths = [out + into for role, (out, into) in workload.facts.linears.items() if role in roles]
    sizes = method.sizes(plan.rank)
    units = sizes.get("hidden", sizes["branch"])  # without hidden units, what two branches make of the input
    return 4 * batch * len(widths) * (sizes["branch"] + UNIT_COPIES * units), 4 * batch * max(widths)


def _kernels(plan: Plan, lengths: int) -> int:
    """Bytes of kernels for rows of so many lengths."""
    of_a_length = KERNEL_BYTES + (LONG_BYTES if plan.tokens > LONG_TOKENS else 0)
    return KERNEL_BYTES + of_a_length * min(lengths, CACHED_LENGTHS) + VARIED_BYTES * (lengths > 1)


def _inputs(workload: Workload) -> int:
    """Bytes of head inputs of rows and texts, and of their covariance; each is there twice, in float32."""
    public, hidden = workload.fleet.public, workload.facts.hidden
    return 8 * hidden * (MOST_ROWS + (public.texts if public is not None else 0) + hidden)


def _frame(workload: Workload, plan: Plan, maps: int) -> int:
    """Bytes of the larger of two phases: features of public texts, and maps into the frame.

    maps: bytes of all maps, which are beside the adapter until they are on it.
    """
    facts, method = workload.facts, workload.method
    sizes = method.sizes(plan.rank)
    texts, hidden = sizes["texts"], facts.hidden
    features = texts * (SVD_COPIES * hidden + sizes["features"]) + SVD_SQUARES * min(texts, hidden) ** 2
    # Z as published and turned; activations of a group of layers, and a layer's centred ones; a layer's map
    roles = workload.fleet.adapter.roles if "F" in method.factors else ()
    mapped = [shape for role, shape in facts.linears.items() if role in roles] or [(0, hidden)]
    largest = texts * max(into for _, into in mapped)
    every = texts * plan.depth * sum(into for _, into in mapped)
    activations = max(min(FRAME_BYTES // 4, every), largest) + largest
    solved = max(SOLVE_SQUARES * into * into + out * into for out, into in mapped)
    return max(4 * features, maps + 4 * (2 * texts * sizes["frame"] + activations + solved))


def loss_chunk_bytes(plan: Plan) -> int:
    """Bytes of logits that the trainer has at once."""
    return LOSS_CHUNK_BYTES // 2 if plan.streamed else LOSS_CHUNK_BYTES


def weights_bytes(facts: Facts, plan: Plan) -> int:
    """Bytes of the frozen parameters. Packed: and the largest matrix expanded. Streamed: of one block."""
    blocks, ends = facts.block_parameters * (1 if plan.streamed else plan.depth), facts.head_parameters
    if plan.weights not in PACKED:
        return int(VALUE_BYTES[plan.weights] * (blocks + ends))
    expanded = 2 * max(out * into for out, into in facts.linears.values())
    return int(VALUE_BYTES[plan.weights] * blocks + VALUE_BYTES["q8_0"] * ends) + expanded


def _kept_block(facts: Facts, plan: Plan, batch: int, width: int) -> int:
    """Bytes that a block keeps for backward when it does not run again."""
    ungated = family_of(facts.family).mlp == "plain"
    intermediate = INTERMEDIATE_ROWS if ungated else KEPT_INTERMEDIATE_ROWS
    if _tile(facts, plan, batch) < batch:  # an MLP in tiles runs again in any case
        intermediate = 0
    hidden = (KEPT_HIDDEN_ROWS + _norm_rows(facts)) * facts.hidden
    heads = KEPT_HEAD_ROWS * facts.heads * facts.head_dim
    return int(KEPT_COPIES * width * batch * (hidden + heads + intermediate * facts.intermediate))


def block_bytes(facts: Facts, plan: Plan, batch: int, width: int) -> int:
    """Bytes of a block's activations and their gradients while it runs again."""
    tile = _tile(facts, plan, batch)
    mlp = batch * HIDDEN_ROWS * facts.hidden + tile * INTERMEDIATE_ROWS * facts.intermediate
    heads = (facts.heads + 2 * facts.kv_heads) * facts.head_dim
    attention = batch * ATTENTION_ROWS * (facts.hidden + heads)
    norms = batch * _norm_rows(facts) * facts.hidden
    return BLOCK_BYTES + int(BLOCK_COPIES[width] * width * (norms + max(mlp, attention)))


def _tile(facts: Facts, plan: Plan, batch: int) -> int:
    """Tokens that go through an MLP at once; only a gated MLP runs in tiles."""
    return batch if family_of(facts.family).mlp == "plain" else min(batch, plan.mlp_tokens or batch)


def _norm_rows(facts: Facts) -> int:
    return NORM_ROWS if family_of(facts.family).norms_after else 0
