"""Predicts the peak memory of training from the model's facts alone; nothing is loaded.

    peak = runtime + kernels + adapter + the largest phase:
           backward through a block      weights + boundaries + activations + block
           between forward and backward  weights + boundaries + activations + loss
           features, maps into the frame weights + frame, where models share one (methods/frames.py)
           completion of prompts         weights + answers, where the method exchanges completions
           start of a head's rows        weights + inputs, where labels have a head
           setting the adapter           weights + state: as a round starts, the version, private factors
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

from msgspec.structs import replace

from edge_runtime import methods
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning import stages
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
# number of labelled tokens where lengths vary, and more where two passes are compared.
KERNEL_BYTES, CACHED_LENGTHS = 8 * MIB, 6
LONG_TOKENS, LONG_BYTES = 256, 4 * MIB
VARIED_BYTES = 20 * MIB
# Code and buffers of NumPy's linear algebra, which stay once maps or rows of a head were solved for.
SOLVER_BYTES = 10 * MIB

# The tokenizer: times its file, less what the first step adds to the runtime; measured with 49,152
# and 262,144 tokens.
TOKENIZER_COPIES, FIRST_STEP_BYTES = 11, 36 * MIB

# Logits that exist at once, unless memory is short, and copies of them that the loss makes.
LOSS_CHUNK_BYTES = 8 * MIB
LOSS_COPIES = {"dense": 2.6, "packed": 1.9}
# Where a second pass is compared with the first, counted: the logits of both, half a chunk each, in
# 16 bits and in 32 with three more of that size; states, and their gradient in 32 bits and in 16.
COMPARED_COPIES, COMPARED_ROWS = 3.5, 5

# A block that runs again: rows of numbers a token, in its MLP or in its attention; copies by the
# bytes of a number.
BLOCK_BYTES = 4 * MIB  # of any size: pieces of the optimiser's step
BLOCK_COPIES = {2: 1.05, 4: 0.75}
HIDDEN_ROWS, INTERMEDIATE_ROWS = 17, 7
ATTENTION_ROWS = 11.5

# A block whose activations are kept: rows a token, and the heap's loss between them.
KEPT_HIDDEN_ROWS, KEPT_HEAD_ROWS, KEPT_INTERMEDIATE_ROWS = 5, 5, 3
KEPT_COPIES = 1.2

# Branches that depend on the token: copies of a hidden unit that backward needs (before and after
# GELU, its gate, their product), and what they take with their gradients.
UNIT_COPIES, BRANCH_COPIES = 4, 2

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

    @cached_property
    def compares_text(self) -> bool:
        """Whether a step has a second pass whose predictions of tokens are compared with the first's."""
        passes = self.method.passes(self.fleet.rounds)
        return self.fleet.head is None and any(pass_.apart for pass_ in passes)

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


def predict(
    workload: Workload, plan: Plan, lengths: int | None = None, *, running: bool = False
) -> dict[str, int]:
    """Predict the memory of a plan, whose terms are not read.

    Args:
        lengths: different lengths of rows in a run, after padding; None: all up to the plan's.
        running: whether the trainer makes steps already, and what comes before them is over.

    Returns:
        Bytes of the terms of the largest phase that are above 0; their sum is the peak.
    """
    facts, method = workload.facts, workload.method
    values = workload.factor_values(plan)
    every = sum(values.values())
    trained = sum(value for name, value in values.items() if method.factors[name].trained)
    sent = sum(value for name, value in values.items() if method.factors[name].exchanged)
    headed, public = workload.fleet.head is not None, workload.fleet.public
    texts = public.texts if public is not None else 0
    kernels = _kernels(plan, lengths or -(-plan.tokens // LENGTH_STEP))
    kernels += SOLVER_BYTES if headed or method.framed else 0
    kernels += VARIED_BYTES if workload.compares_text else 0
    # Micro-batches that share a step add up their gradients.
    trained_bytes = TRAINED_BYTES + (SUM_BYTES if plan.rows < workload.rows_a_step else 0)
    adapter = trained_bytes * trained + FROZEN_BYTES * (every - trained)
    weights = weights_bytes(facts, plan)
    training, block = _training(workload, plan, every)
    forward = block // 2
    # Stages before training have no state of the optimiser and no sums of gradients.
    later = (trained_bytes - FROZEN_BYTES) * trained
    # Keys and values of a micro-batch.
    cache = 2 * facts.kv_heads * facts.head_dim * _width(plan) * plan.rows * plan.tokens * plan.depth
    # The first step's code, kernels and adapter come after the tokenizer is gone.
    tokenizer = TOKENIZER_COPIES * facts.tokenizer_bytes - FIRST_STEP_BYTES - kernels - adapter
    phases: list[dict[str, int]] = [
        {"weights": weights} | training,
        {"weights": weights, "answers": cache + forward if method.answers is not None else 0},
        {"weights": weights, "inputs": stages.of_head(facts.hidden, texts) + forward if headed else 0},
        # The delta and what rounding loses, beside the factor, which becomes the latter.
        {"encode": ENCODE_BYTES * sent},
    ]
    if not running:
        state, frame = stages.of_start(method, values), 0
        # without a frame, nothing has gone through the model yet
        state -= 0 if method.framed else kernels
        if method.framed:
            roles, whole = workload.fleet.adapter.roles, replace(plan, mlp_tokens=None)
            untiled = max(block, block_bytes(facts, whole, plan.rows * plan.tokens, _width(plan)))
            frame = stages.of_frame(facts, method, roles, plan, untiled // 2)
        phases += [{"weights": weights, "state": state - later}, {"weights": weights, "frame": frame - later}]
        phases += [{"tokenizer": tokenizer}]
    largest = max(phases, key=lambda phase: sum(phase.values()))
    always = {"runtime": workload.runtime_bytes, "kernels": kernels, "adapter": adapter}
    return always | {name: size for name, size in largest.items() if size}


def _training(workload: Workload, plan: Plan, factors: int) -> tuple[dict[str, int], int]:
    """The terms of a step beside weights and adapter; and the bytes of a block that runs again.

    factors: numbers in all factors.
    """
    facts, method, width = workload.facts, workload.method, _width(plan)
    batch = plan.rows * plan.tokens  # tokens of a micro-batch
    # These methods join the factors of a block, beside the factors themselves.
    joined = FROZEN_BYTES * factors // plan.depth if method.kept or method.inner is not None else 0
    branches, copies = _branches(workload, plan, batch)
    kept = _kept_block(facts, plan, batch, width) + joined + branches
    block = block_bytes(facts, plan, batch, width) + copies
    block += 2 * joined + BRANCH_COPIES * branches  # and their gradients
    boundary = facts.hidden + 4 if plan.boundaries == "int8" else width * facts.hidden  # of a token
    terms = {
        "boundaries": batch * boundary * (plan.depth - plan.kept_blocks),
        "activations": plan.kept_blocks * kept,
    }
    # The kept block that goes through backward is among the activations.
    again = max(block - kept, 0) if plan.kept_blocks else block
    chunk = min(width * batch * facts.vocabulary, loss_chunk_bytes(plan))
    loss = int(LOSS_COPIES["packed" if plan.weights in PACKED else "dense"] * chunk)
    if workload.compares_text:
        # the states of a step's tokens in the first pass, until the second
        terms["references"] = width * workload.rows_a_step * plan.tokens * facts.hidden
        loss = int(COMPARED_COPIES * chunk) + COMPARED_ROWS * width * batch * facts.hidden
    return terms | ({"block": again} if again > loss else {"loss": loss}), block


def _branches(workload: Workload, plan: Plan, batch: int) -> tuple[int, int]:
    """Bytes that branches which depend on the token keep in a block, and of one layer's input and output; in float32."""
    method, roles = workload.method, workload.fleet.adapter.roles
    if method.branch is None:
        return 0, 0
    shapes = [shape for role, shape in workload.facts.linears.items() if role in roles]
    sizes = method.sizes(plan.rank)
    units = sizes.get("hidden", sizes["branch"])  # without hidden units, what two branches make of the input
    kept = 4 * batch * len(shapes) * (sizes["branch"] + UNIT_COPIES * units)
    # a gate's gradient is an input's too
    gate = 0 if method.gate is None else max(into for _, into in shapes)
    return kept, 4 * batch * (max(map(sum, shapes)) + gate)


def _kernels(plan: Plan, lengths: int) -> int:
    """Bytes of kernels for rows of so many lengths."""
    of_a_length = KERNEL_BYTES + (LONG_BYTES if plan.tokens > LONG_TOKENS else 0)
    return KERNEL_BYTES + of_a_length * min(lengths, CACHED_LENGTHS) + VARIED_BYTES * (lengths > 1)


def _width(plan: Plan) -> int:
    """Bytes of a number in the activations."""
    return 4 if plan.weights == "float32" else 2


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
