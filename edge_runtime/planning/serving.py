"""Predicts the peak memory of a server that answers beside the trainer; nothing is loaded.

    peak = runtime + server + tokenizer + weights + keys and values + adapters + a pass of the model

The server computes with ONNX Runtime where it can serve the model, and both fit the budget; else with
torch. The graph for ONNX Runtime is written before a trainer runs, by a process that holds less than
a trainer does (graphs.py), so it adds nothing to the peak.

The factors were fitted to measured peaks of the process; `make bench-serve-peak` prints prediction
beside measurement.
"""

from edge_profiles import format_size
from msgspec.structs import replace

from edge_runtime.adapters.export.onnx_form import WEIGHTS, groups
from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Method
from edge_runtime.planning.predict import (
    TOKENIZER_COPIES,
    Workload,
    block_bytes,
    weights_bytes,
)
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Backend, Weights

MIB = 1 << 20
PIECE = 256  # most tokens of a prompt that go through the model at once, of one answer after another
SERVER_BYTES = 25 * MIB  # HTTP, and what the heap loses
HELD_COPIES = 3  # times the tokenizer's file, once it is loaded
LOGITS_BYTES = 12  # of a token: float32, and two copies where one is drawn

# torch
CACHE_COPIES = 1.3  # keys and values are copied as they grow
READ_ADAPTERS, HELD_ADAPTERS = 2, 3  # float32 as it was read; of old answers, of new ones, and the next

# ONNX Runtime
SESSION_BYTES, PACKED_BYTES = 12 * MIB, 16 * MIB  # of any graph, and of the operators for packed matrices
# of a number of the weights, as the session has packed them; q4_1: with its shifts
GRAPH_VALUE_BYTES = {"float32": 4.0, "bfloat16": 4.0, "q8_0": 1.25, "q4_0": 0.75, "q4_1": 0.875}
# of a number of the embedding: as a head, whose matrix is packed again; as rows that stay in the
# file's pages; and in pages that only packing reads
TABLE, TABLE_PACKED = (4.0, 4.0, 0.0), (1.25, 0.125, 1.0)
ADAPTERS = 3  # of old answers, of new ones, and the next
PASS_ROWS = 6  # of the MLP's width, a token of a piece


def require_servable(method: Method) -> None:
    """Raise InputError where there is nothing of a method's adapter to serve, or to hand to a command."""
    if method.branch is not None:
        raise InputError(
            f"the branches of {method.name} depend on the token, so its adapter is no LoRA, and nothing can answer with it: "
            "leave out --serve and --on-version"
        )


def backends(workload: Workload, weights: Weights) -> tuple[Backend | None, ...]:
    """What a server of a model may compute with, the faster first; None: there is no server."""
    if workload.serving is None:
        return (None,)
    return ("torch",) if _fault(workload, weights) else ("onnx", "torch")


def why(workload: Workload, plan: Plan) -> str:
    """A sentence that says why a plan's server computes with its backend; "" without a server."""
    if plan.server is None:
        return ""
    if plan.server == "onnx":
        return "ONNX Runtime serves, which is faster than torch on a CPU"
    reason = _fault(workload, plan.weights)
    if not reason:
        needed = serving_bytes(workload, replace(plan, server="onnx"))
        reason = f"ONNX Runtime would need {format_size(needed)} to serve"
    return f"torch serves: {reason}"


def _fault(workload: Workload, weights: Weights) -> str:
    """Why ONNX Runtime does not serve a model; "" where it can."""
    serving = workload.serving
    assert serving is not None
    if weights not in WEIGHTS:
        return f"ONNX Runtime has no fast operator for {weights}"
    fault = "" if serving.onnx_bytes else "ONNX Runtime is not used here"
    return serving.unserved.get(workload.facts.model_class, fault)


def serving_bytes(workload: Workload, plan: Plan) -> int:
    """Predicted peak bytes of the server that serves what a plan trains; 0 where there is no server."""
    facts, serving = workload.facts, workload.serving
    if serving is None:
        return 0
    plan = replace(plan, streamed=False, mlp_tokens=None)
    onnx = plan.server == "onnx"
    runtime = serving.onnx_bytes if onnx else workload.runtime_bytes
    model = _onnx(workload, plan) if onnx else _torch(workload, plan)
    model += HELD_COPIES * facts.tokenizer_bytes
    # the tokenizer is loaded first
    return SERVER_BYTES + runtime + max(TOKENIZER_COPIES * facts.tokenizer_bytes, model)


def _torch(workload: Workload, plan: Plan) -> int:
    facts, width = workload.facts, 4 if plan.weights == "float32" else 2
    roles = workload.fleet.adapter.roles
    widths = (sum(shape) for role, shape in facts.linears.items() if role in roles)
    adapter = plan.rank * plan.depth * sum(widths)
    return (
        weights_bytes(facts, plan)
        + int(CACHE_COPIES * width * _cache_values(workload, plan))
        + adapter * (4 * READ_ADAPTERS + width * HELD_ADAPTERS)
        + block_bytes(facts, plan, PIECE, width)
        + LOGITS_BYTES * facts.vocabulary
    )


def _onnx(workload: Workload, plan: Plan) -> int:
    facts, roles, packed = workload.facts, workload.fleet.adapter.roles, plan.weights in PACKED
    table, adapter = facts.vocabulary * facts.hidden, 0
    for group in groups(facts.linears).values():
        rank = plan.rank * sum(role in roles for role in group)
        outs, intos = zip(*(facts.linears[role] for role in group), strict=True)
        adapter += rank * (intos[0] + sum(outs))
    head, mapped, loading = TABLE_PACKED if packed else TABLE
    serving = (
        4 * _cache_values(workload, plan)
        + 4 * plan.depth * adapter * ADAPTERS
        + 4 * PIECE * PASS_ROWS * facts.intermediate
        + LOGITS_BYTES * facts.vocabulary
    )
    return (
        SESSION_BYTES
        + PACKED_BYTES * packed
        + int(GRAPH_VALUE_BYTES[plan.weights] * plan.depth * facts.block_parameters)
        + int((head + mapped) * table)
        + max(int(loading * table), serving)
    )


def _cache_values(workload: Workload, plan: Plan) -> int:
    """Keys and values of all answers that are written at once."""
    facts, serving = workload.facts, workload.serving
    assert serving is not None
    tokens = serving.parallel * min(serving.context, facts.positions)
    return tokens * 2 * facts.kv_heads * facts.head_dim * plan.depth
