"""Facts of real architectures, whose weights no test needs, and the rates of a machine."""

import msgspec

from edge_runtime.models.facts import Facts
from edge_runtime.planning.time import Rates
from edge_runtime.protocol.plan import Plan

RATES = Rates(
    bfloat16_flops=389e9, float32_flops=167e9, copy_bytes=41e9
)  # the probe, on two cores of an AMD EPYC
SMOLLM2 = Facts(
    model_class="smollm2@1",
    folder="",
    weights="",
    family="llama",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocabulary=49152,
    positions=2048,
    tied_head=True,
    linears={"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    | {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)},
    blocks="model.layers",
)
GEMMA = msgspec.structs.replace(
    SMOLLM2,
    model_class="gemma@1",
    family="gemma3_text",
    layers=18,
    hidden=640,
    heads=4,
    kv_heads=1,
    head_dim=256,
    intermediate=2048,
    vocabulary=262144,
    linears={"q": (1024, 640), "k": (256, 640), "v": (256, 640), "o": (640, 1024)}
    | {"gate": (2048, 640), "up": (2048, 640), "down": (640, 2048)},
)


def bare_plan(facts, depth, weights, **fields):
    """A plan of a model without its predictions."""
    needed = {
        "source": "m",
        "rank": 4,
        "rows": 1,
        "tokens": 64,
        "terms": {},
        "step_seconds": 0.0,
        "mlp_tokens": 1024,
    }
    needed |= {"layers": facts.layers, "model_class": facts.model_class}
    return Plan(depth=depth, weights=weights, **needed | fields)
