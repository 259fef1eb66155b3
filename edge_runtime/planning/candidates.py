"""The plans that a device may choose from, each with its predicted memory and time."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.planning.predict import FEWER_MLP_TOKENS, KERNEL_BYTES, LENGTH_STEP, MLP_TOKENS, predict
from edge_runtime.planning.time import Rates, step_seconds
from edge_runtime.planning.workload import Workload
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Boundaries, Fleet, Weights


class FrozenModel(NamedTuple):
    """The frozen model of a plan."""

    source: str  # as the catalog names it
    depth: int  # layers
    weights: Weights


class Schedule(NamedTuple):
    """How a step's rows go through the model; the fields of a Plan of the same names."""

    rows: int
    boundaries: Boundaries = "input"
    mlp_tokens: int | None = MLP_TOKENS
    streamed: bool = False
    kept_blocks: int = 0


def candidates(
    fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int, rates: Rates
) -> Iterator[list[Plan]]:
    """The plans of each model and weight format; both levels are in order of preference.

    A list goes from the longest sequence, highest rank and largest micro-batch to the shortest, the
    lowest and a single row with 8-bit boundaries and small tiles of the MLP, or with streamed
    weights where they are packed. Lengths above a model's positions are left out, unless all are.

    Args:
        facts: of each source in the catalog.

    Raises:
        InputError: a model does not have the depth, or all lengths are too long for it.
    """
    training, adapter = fleet.training, fleet.adapter
    lengths = (training.max_tokens, *training.shorter)
    for model in fleet.catalog:
        workload = Workload.of(fleet, facts[model.source], runtime_bytes)
        layers, positions = workload.facts.layers, workload.facts.positions
        depth = layers if model.depth is None else model.depth
        if not 1 <= depth <= layers:
            raise InputError(f"the catalog wants {depth} layers of {model.source}, which has {layers}")
        possible = [tokens for tokens in lengths if tokens <= positions] or lengths[-1:]
        for weights in model.weights:
            yield [
                plan(
                    workload,
                    rates,
                    FrozenModel(model.source, depth, weights),
                    tokens=tokens,
                    rank=rank,
                    schedule=schedule,
                )
                for tokens in possible
                for rank in (adapter.rank, *adapter.lower)
                for schedule in _schedules(training.rows_a_step, weights, tokens)
                if not (schedule.streamed and workload.method.reads_weights)
            ]


def plan(
    workload: Workload,
    rates: Rates,
    base: FrozenModel,
    *,
    tokens: int,
    rank: int,
    schedule: Schedule,
    lengths: int | None = None,
) -> Plan:
    """A plan with its predictions.

    Args:
        lengths: different lengths of rows, after padding; None: all up to `tokens`.

    Raises:
        InputError: the model or the method cannot be trained so.
    """
    for fault in _faults(workload, base, tokens, schedule):
        raise InputError(fault)
    bare = Plan(
        source=base.source,
        model_class=workload.facts.model_class,
        depth=base.depth,
        layers=workload.facts.layers,
        weights=base.weights,
        rank=rank,
        tokens=tokens,
        terms={},
        step_seconds=0.0,
        **schedule._asdict(),
    )
    return predicted(workload, rates, bare, lengths)


def predicted(workload: Workload, rates: Rates, plan: Plan, lengths: int | None = None) -> Plan:
    """The plan with predictions for its present fields."""
    return msgspec.structs.replace(
        plan,
        terms=predict(workload, plan, lengths or -(-plan.tokens // LENGTH_STEP)).terms(),
        step_seconds=step_seconds(workload, plan, rates),
    )


def _faults(workload: Workload, base: FrozenModel, tokens: int, schedule: Schedule) -> Iterator[str]:
    facts, method = workload.facts, workload.method
    if tokens > facts.positions:
        key = "shorter goes down to" if tokens < workload.max_tokens else "max_tokens is"
        yield f"[training] {key} {tokens}, but {base.source} has {facts.positions} positions"
    if base.weights in PACKED and family_of(facts.family).transposed:
        yield f"{base.source} is a {facts.family} model, whose matrices cannot be packed: use float32 or bfloat16"
    if schedule.streamed and method.reads_weights:
        yield f"{method.name} takes frames from the model's weights, which cannot be streamed then: use drawn ones"
    if schedule.streamed and base.weights not in PACKED:
        yield f"weights in {base.weights} cannot be streamed: use one of {', '.join(PACKED)}"
    if schedule.streamed and schedule.kept_blocks:
        yield "blocks whose weights are streamed cannot run once: they would keep them"
    if not 0 <= schedule.kept_blocks <= base.depth:
        yield f"{schedule.kept_blocks} blocks are to run once, but {base.source} has {base.depth} of them here"


def lower(workload: Workload, plan: Plan) -> list[Plan]:
    """A running trainer's plan, without a tokenizer, and plans to go on with in ever less memory.

    First all blocks run again; then come smaller micro-batches, 8-bit boundaries, and small tiles
    of the MLP. Model, weights, rank and length stay. Seconds are not predicted anew.
    """
    facts = msgspec.structs.replace(workload.facts, tokenizer_bytes=0)
    workload = dataclasses.replace(workload, facts=facts)

    def running(schedule: Schedule) -> Plan:
        changed = msgspec.structs.replace(plan, **schedule._asdict())
        terms = predict(workload, changed, lengths=1).terms()
        # Kernels of the steps so far stay, and another micro-batch adds its own.
        terms["kernels"] = plan.terms["kernels"] + KERNEL_BYTES * (schedule.rows != plan.rows)
        return msgspec.structs.replace(changed, terms=terms)

    present = Schedule(plan.rows, plan.boundaries, plan.mlp_tokens, plan.streamed)
    later = [
        schedule
        for schedule in _schedules(workload.rows_a_step, plan.weights, plan.tokens)
        if schedule != present and schedule.rows <= plan.rows and schedule.streamed == plan.streamed
    ]
    plans = [running(present._replace(kept_blocks=plan.kept_blocks))]
    if plan.kept_blocks:
        plans.append(running(present))
    for schedule in later:
        smaller = running(schedule)
        if smaller.predicted_peak_bytes < plans[-1].predicted_peak_bytes:
            plans.append(smaller)
    return plans


def _schedules(rows_a_step: int, weights: Weights, tokens: int) -> Iterator[Schedule]:
    """From the fastest and most exact to the smallest."""
    rows = rows_a_step
    while rows > 1:
        yield Schedule(rows)
        rows = -(-rows // 2)
    yield Schedule(1)
    yield Schedule(1, "int8")
    if tokens > FEWER_MLP_TOKENS:
        yield Schedule(1, "int8", FEWER_MLP_TOKENS)
    if weights in PACKED:  # without tiles: a streamed weight is gone when a tile would run again
        yield Schedule(1, "int8", None, True)
