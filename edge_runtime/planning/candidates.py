"""The plans that a device may choose from, each with its predicted memory and time."""

from collections.abc import Iterator

from msgspec.structs import replace

from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.planning.predict import KERNEL_BYTES, Serving, Workload, predict
from edge_runtime.planning.serving import backends, serving_bytes
from edge_runtime.planning.time import Rates, step_seconds
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Fleet

# Tokens that go through an MLP at once: at no cost in time, and where memory is short.
MLP_TOKENS, FEWER_MLP_TOKENS = 1024, 256


def candidates(
    fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int, rates: Rates, serving: Serving | None = None
) -> Iterator[list[Plan]]:
    """The plans of each model and weight format; both levels are in order of preference.

    A list goes from the longest sequence, highest rank and largest micro-batch to the shortest, the
    lowest and a single row with 8-bit boundaries and small tiles of the MLP, or with streamed
    weights where they are packed. Lengths above a model's positions are left out, unless all are.
    A plan with a server is there with each backend, the faster one first.

    Args:
        facts: of each source in the catalog.
        serving: as Workload has it.

    Raises:
        InputError: a model does not have the depth, or all lengths are too long for it.
    """
    training, adapter = fleet.training, fleet.adapter
    lengths = (training.max_tokens, *training.shorter)
    for model in fleet.catalog:
        workload = Workload(fleet, facts[model.source], runtime_bytes, serving)
        layers, positions = workload.facts.layers, workload.facts.positions
        depth = layers if model.depth is None else model.depth
        if not 1 <= depth <= layers:
            raise InputError(f"the catalog wants {depth} layers of {model.source}, which has {layers}")
        possible = [tokens for tokens in lengths if tokens <= positions] or lengths[-1:]
        for weights in model.weights:
            bare = Plan(
                source=model.source,
                model_class=workload.facts.model_class,
                depth=depth,
                layers=layers,
                weights=weights,
                rank=adapter.rank,
                rows=1,
                tokens=training.max_tokens,
                terms={},
                step_seconds=0.0,
            )
            yield [
                predicted(workload, rates, replace(plan, server=server))
                for tokens in possible
                for rank in (adapter.rank, *adapter.lower)
                for plan in _schedules(
                    replace(bare, tokens=tokens, rank=rank), training.rows_a_step, workload.method
                )
                for server in backends(workload, weights)
                if not (plan.streamed and workload.method.reads_weights)
            ]


def predicted(workload: Workload, rates: Rates, plan: Plan, lengths: int | None = None) -> Plan:
    """The plan with its predictions, in place of those it has.

    Args:
        lengths: as `predict` has it.

    Raises:
        InputError: the model or the method cannot be trained so.
    """
    for fault in _faults(workload, plan):
        raise InputError(fault)
    terms, seconds = predict(workload, plan, lengths), step_seconds(workload, plan, rates)
    return replace(plan, terms=terms, step_seconds=seconds, serving_bytes=serving_bytes(workload, plan))


def _faults(workload: Workload, plan: Plan) -> Iterator[str]:
    facts, method = workload.facts, workload.method
    if plan.tokens > facts.positions:
        key = "shorter goes down to" if plan.tokens < workload.fleet.training.max_tokens else "max_tokens is"
        yield f"[training] {key} {plan.tokens}, but {plan.source} has {facts.positions} positions"
    if plan.weights in PACKED and family_of(facts.family).transposed:
        yield f"{plan.source} is a {facts.family} model, whose matrices cannot be packed: use float32 or bfloat16"
    if plan.streamed and method.reads_weights:
        yield f"{method.name} takes frames from the model's weights, which cannot be streamed then: use drawn ones"
    if plan.streamed and plan.weights not in PACKED:
        yield f"weights in {plan.weights} cannot be streamed: use one of {', '.join(PACKED)}"
    if plan.streamed and plan.kept_blocks:
        yield "blocks whose weights are streamed cannot run once: they would keep them"
    if not 0 <= plan.kept_blocks <= plan.depth:
        yield f"{plan.kept_blocks} blocks are to run once, but {plan.source} has {plan.depth} of them here"


def lower(workload: Workload, plan: Plan) -> list[Plan]:
    """A running trainer's plan, and plans to go on with in ever less memory, as predicted from here on.

    First all blocks run again; then come smaller micro-batches, 8-bit boundaries, and small tiles
    of the MLP. Model, weights, rank and length stay. Seconds are not predicted anew.
    """

    def running(changed: Plan) -> Plan:
        terms = predict(workload, changed, lengths=1, running=True)
        # Kernels of the steps so far stay, and another micro-batch adds its own.
        terms["kernels"] = plan.terms["kernels"] + KERNEL_BYTES * (changed.rows != plan.rows)
        return replace(changed, terms=terms)

    plans = [running(plan)]
    if plan.kept_blocks:
        plans.append(running(replace(plan, kept_blocks=0)))
    for changed in _schedules(plan, workload.rows_a_step, workload.method):
        if changed.rows <= plan.rows and changed.streamed == plan.streamed:
            smaller = running(changed)
            if smaller.predicted_peak_bytes < plans[-1].predicted_peak_bytes:
                plans.append(smaller)
    return plans


def _schedules(plan: Plan, rows_a_step: int, method: Method) -> Iterator[Plan]:
    """The plan with each way of a step's rows through the model, from the fastest to the smallest."""
    tile = MLP_TOKENS if method.gate is None else None  # a gate reads whole rows
    plan = replace(plan, boundaries="input", mlp_tokens=tile, streamed=False, kept_blocks=0)
    rows = rows_a_step
    while rows > 1:
        yield replace(plan, rows=rows)
        rows = -(-rows // 2)
    yield replace(plan, rows=1)
    yield replace(plan, rows=1, boundaries="int8")
    if tile and plan.tokens > FEWER_MLP_TOKENS:
        yield replace(plan, rows=1, boundaries="int8", mlp_tokens=FEWER_MLP_TOKENS)
    if plan.weights in PACKED:  # without tiles: a streamed weight is gone when a tile would run again
        yield replace(plan, rows=1, boundaries="int8", mlp_tokens=None, streamed=True)
