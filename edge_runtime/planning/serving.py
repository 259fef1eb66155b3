"""Predicts the peak memory of a server that answers beside the trainer; nothing is loaded.

    peak = runtime + server + tokenizer + weights + keys and values + adapters + a pass of the model

The factors were fitted to measured peaks of the process, of which a test keeps them near
(tests/system/test_serve.py).
"""

from msgspec.structs import replace

from edge_runtime.planning.predict import TOKENIZER_COPIES, Workload, block_bytes, weights_bytes
from edge_runtime.protocol.plan import Plan

MIB = 1 << 20
PIECE = 256  # most tokens of a prompt that go through the model at once, of one answer after another
SERVER_BYTES = 25 * MIB  # HTTP, and what the heap loses
CACHE_COPIES = 1.3  # keys and values are copied as they grow
READ_ADAPTERS, HELD_ADAPTERS = 2, 3  # float32 as it was read; of old answers, of new ones, and the next
LOGITS_BYTES = 12  # of a token: float32, and two copies where one is drawn


def serving_bytes(workload: Workload, plan: Plan) -> int:
    """Predicted peak bytes of the server that serves what a plan trains; 0 where there is no server."""
    facts, serving = workload.facts, workload.serving
    if serving is None:
        return 0
    width = 4 if plan.weights == "float32" else 2
    plan = replace(plan, streamed=False, mlp_tokens=None)
    token = 2 * facts.kv_heads * facts.head_dim * width * plan.depth
    cache = int(CACHE_COPIES * serving.parallel * min(serving.context, facts.positions) * token)
    linears = (sum(shape) for role, shape in facts.linears.items() if role in workload.fleet.adapter.roles)
    adapter = plan.rank * plan.depth * sum(linears)
    return (
        workload.runtime_bytes
        + SERVER_BYTES
        + TOKENIZER_COPIES * facts.tokenizer_bytes
        + weights_bytes(facts, plan)
        + cache
        + adapter * (4 * READ_ADAPTERS + width * HELD_ADAPTERS)
        + block_bytes(facts, plan, PIECE, width)
        + LOGITS_BYTES * facts.vocabulary
    )
