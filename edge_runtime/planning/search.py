"""Picks what a device trains within its budget.

The first model of the catalog that fits, then the most precise weights, the longest sequence, the highest rank, and last the
largest micro-batch. Where the fleet has a deadline for a step, only of the plans that are predicted to be in time. What memory
is left over then saves time: blocks whose activations fit are kept whole, and do not run again in backward.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from edge_profiles import format_size

from edge_runtime import methods
from edge_runtime.errors import BudgetError, InputError
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.planning.predict import FEWER_MLP_TOKENS, KERNEL_BYTES, LENGTH_STEP, MLP_TOKENS, terms
from edge_runtime.planning.time import Rates, step_seconds
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import PACKED, Boundaries, Fleet, Role, Weights, rows_of_a_step

FULL = 0.95  # of the budget, which memory that only saves time may fill: a prediction can be wrong by a twentieth
UNPACKED_FAMILIES = ("gpt2",)  # their linear layers are no nn.Linear


class Way(NamedTuple):
    """How rows go through a model, as a plan has it."""

    rows: int
    boundaries: Boundaries = "input"
    mlp_tokens: int | None = MLP_TOKENS
    streamed: bool = False
    kept_blocks: int = 0


class Choice(NamedTuple):
    """What fits, and what was preferred but is too large or too slow.

    fits: the winner. rejected: of each model and format before the winner's the smallest plan, or the fastest of those that
    are small enough. better: the plan of the winner's model that comes right before it; None where the winner is the first
    of its model.
    """

    fits: Plan
    rejected: list[Plan]
    better: Plan | None


def choose(
    fleet: Fleet,
    facts: dict[str, Facts],
    budget_bytes: int,
    runtime_bytes: int,
    rates: Rates,
    *,
    fill: bool = True,
) -> Choice:
    """The best plan within a budget, and within the fleet's deadline for a step if it has one.

    Args:
        fleet: its catalog is in order of preference.
        facts: of each source in the catalog.
        budget_bytes: what the trainer process may take at its peak, the runtime included.
        runtime_bytes: the measured baseline of this device. rates: measured too.
        fill: what is left of the budget, with blocks that run once.

    Raises:
        BudgetError: nothing fits; it says the smallest budget that would do, or the shortest step that is possible.
        InputError: a depth that a model has not, or lengths that are all too long for it.
    """
    rejected: list[Plan] = []
    every: list[Plan] = []
    small: list[Plan] = []
    before: Plan | None = None
    deadline_s = fleet.training.step_deadline_s
    for plans in candidates(fleet, facts, runtime_bytes, rates):
        every.extend(plans)
        too_slow: list[Plan] = []
        for way in plans:
            if way.predicted_peak_bytes <= budget_bytes:
                known = facts[way.source]
                fits = _filled(fleet, known, way, budget_bytes, runtime_bytes, rates) if fill else way
                if over_deadline_s(fits, deadline_s) == 0:
                    same = before is not None and (before.source, before.depth) == (way.source, way.depth)
                    return Choice(fits, rejected, before if same else None)
                too_slow.append(fits)
            before = way
        rejected.append(min(too_slow, key=_seconds) if too_slow else min(plans, key=_bytes))
        small += too_slow
    raise BudgetError(_why_none(every, small, budget_bytes, deadline_s))


def _filled(
    fleet: Fleet, known: Facts, fits: Plan, budget_bytes: int, runtime_bytes: int, rates: Rates
) -> Plan:
    """The plan with as many blocks that run once as there is memory left for."""
    for kept_blocks in range(0 if fits.streamed else fits.depth, 0, -1):
        faster = plan(
            fleet,
            known,
            fits.source,
            fits.depth,
            fits.weights,
            tokens=fits.tokens,
            rank=fits.rank,
            way=Way(fits.rows, fits.boundaries, fits.mlp_tokens, fits.streamed, kept_blocks),
            runtime_bytes=runtime_bytes,
            rates=rates,
        )
        if faster.predicted_peak_bytes <= FULL * budget_bytes:
            return faster
    return fits


def over_deadline_s(way: Plan, deadline_s: float | None) -> float:
    """Seconds that a step is predicted to take beyond the deadline; 0 where it is in time."""
    return 0.0 if deadline_s is None else max(0.0, way.step_seconds - deadline_s)


def _why_none(every: list[Plan], small: list[Plan], budget_bytes: int, deadline_s: float | None) -> str:
    """every: as enumerated; small: those within the budget, filled."""
    in_time = [way for way in every if over_deadline_s(way, deadline_s) == 0]
    if small or not in_time:
        fastest = min(small or every, key=_seconds)
        within = f" in a budget of {format_size(budget_bytes)}" if small else ""
        return (
            f"no model of the catalog makes a step within {deadline_s:g} s{within}; the fastest would be {_named(fastest)}, "
            f"which takes {fastest.step_seconds:.3g} s"
        )
    least = min(in_time, key=_bytes)
    too_slow = "" if len(in_time) == len(every) else f" and makes a step within {deadline_s:g} s"
    return (
        f"a budget of {format_size(budget_bytes)} is too small for every model of the catalog; the smallest that would fit"
        f"{too_slow} is {_named(least)}, which needs {format_size(least.predicted_peak_bytes)}"
    )


def _named(way: Plan) -> str:
    return f"{way.source} with {way.depth} layers in {way.weights}, rank {way.rank} and {way.tokens} tokens"


def _bytes(way: Plan) -> int:
    return way.predicted_peak_bytes


def _seconds(way: Plan) -> float:
    return way.step_seconds


def candidates(
    fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int, rates: Rates
) -> Iterator[list[Plan]]:
    """For each model and weight format in order of preference, its plans in order of preference: from the longest sequence,
    highest rank and largest micro-batch to the shortest, the lowest and a single row with 8-bit boundaries and MLPs in small
    tiles, or, where they are packed, streamed weights without tiles.

    Lengths above a model's positions are left out, unless all are.
    """
    training, adapter = fleet.training, fleet.adapter
    method = methods.build(fleet.method, fleet.head, fleet.codistill)
    lengths = (training.max_tokens, *training.shorter)
    for model in fleet.catalog:
        known = facts[model.source]
        depth = known.layers if model.depth is None else model.depth
        if not 1 <= depth <= known.layers:
            raise InputError(f"the catalog wants {depth} layers of {model.source}, which has {known.layers}")
        possible = [tokens for tokens in lengths if tokens <= known.positions] or lengths[-1:]
        for weights in model.weights:
            yield [
                plan(
                    fleet,
                    known,
                    model.source,
                    depth,
                    weights,
                    tokens=tokens,
                    rank=rank,
                    way=way,
                    runtime_bytes=runtime_bytes,
                    rates=rates,
                )
                for tokens in possible
                for rank in (adapter.rank, *adapter.lower)
                for way in _ways(training.rows_a_step, weights, tokens)
                if not (way.streamed and method.reads_weights)
            ]


def plan(
    fleet: Fleet,
    known: Facts,
    source: str,
    depth: int,
    weights: Weights,
    *,
    tokens: int,
    rank: int,
    way: Way,
    runtime_bytes: int,
    rates: Rates,
    lengths: int | None = None,
) -> Plan:
    """One way to train a model, with what is predicted for it.

    Args:
        lengths: of the rows, after padding; None: all there are up to `tokens`.

    Raises:
        InputError: a sequence is longer than the model has positions, its family cannot be packed, weights are to be streamed
            that are not packed or of which the method takes frames, or blocks are to run once that are streamed or not there.
    """
    if tokens > known.positions:
        key = "shorter goes down to" if tokens in fleet.training.shorter else "max_tokens is"
        raise InputError(f"[training] {key} {tokens}, but {source} has {known.positions} positions")
    if weights in PACKED and known.family in UNPACKED_FAMILIES:
        raise InputError(
            f"{source} is a {known.family} model, whose matrices cannot be packed: use float32 or bfloat16"
        )
    method = methods.build(fleet.method, fleet.head, fleet.codistill)
    if way.streamed and method.reads_weights:
        raise InputError(
            f"{method.name} takes frames from the model's weights, which cannot be streamed then: use drawn ones"
        )
    if way.streamed and weights not in PACKED:
        raise InputError(f"weights in {weights} cannot be streamed: use one of {', '.join(PACKED)}")
    if way.streamed and way.kept_blocks:
        raise InputError("blocks whose weights are streamed cannot run once: they would keep them")
    if not 0 <= way.kept_blocks <= depth:
        raise InputError(f"{way.kept_blocks} blocks are to run once, but {source} has {depth} of them here")
    made = Plan(
        source=source,
        model_class=known.model_class,
        depth=depth,
        layers=known.layers,
        weights=weights,
        rank=rank,
        tokens=tokens,
        terms={},
        step_seconds=0.0,
        **way._asdict(),
    )
    roles, rows_a_step = fleet.adapter.roles, rows_of_a_step(fleet.training, fleet.codistill)
    predicted = terms(
        known,
        made,
        method=method,
        roles=roles,
        rows_a_step=rows_a_step,
        lengths=lengths or -(-tokens // LENGTH_STEP),
        runtime_bytes=runtime_bytes,
    )
    headed = fleet.head is not None
    seconds = step_seconds(
        known, made, method=method, roles=roles, rows_a_step=rows_a_step, rates=rates, headed=headed
    )
    return msgspec.structs.replace(made, terms=predicted, step_seconds=seconds)


def lower(
    known: Facts, plan: Plan, *, method: Method, roles: tuple[Role, ...], rows_a_step: int
) -> list[Plan]:
    """The plan as a running trainer has it, whose tokenizer is gone, and those that it can go on with, each in less memory than
    the one before: all blocks run again, then smaller micro-batches, 8-bit boundaries, small tiles of the MLP.

    Model, weights, rank and length stay; the time a step is not predicted.
    """
    known = msgspec.structs.replace(known, tokenizer_bytes=0)

    def predicted(way: Way) -> Plan:
        made = msgspec.structs.replace(plan, **way._asdict())
        runtime_bytes = plan.terms["runtime"]
        found = terms(
            known,
            made,
            method=method,
            roles=roles,
            rows_a_step=rows_a_step,
            lengths=1,
            runtime_bytes=runtime_bytes,
        )
        found["kernels"] = plan.terms["kernels"] + KERNEL_BYTES * (way.rows != plan.rows)  # those so far stay
        return msgspec.structs.replace(made, terms=found)

    first = Way(plan.rows, plan.boundaries, plan.mlp_tokens, plan.streamed)
    ways = [way for way in _ways(rows_a_step, plan.weights, plan.tokens) if way != first]
    found = [predicted(first._replace(kept_blocks=plan.kept_blocks))]
    for way in [first, *ways] if plan.kept_blocks else ways:
        if way.rows > plan.rows or way.streamed != plan.streamed:
            continue
        made = predicted(way)
        if way == first or made.predicted_peak_bytes < found[-1].predicted_peak_bytes:
            found.append(made)
    return found


def _ways(rows_a_step: int, weights: Weights, tokens: int) -> Iterator[Way]:
    """From the fastest and most exact to the smallest. Streamed weights are gone when a tile would run again."""
    rows = rows_a_step
    while rows > 1:
        yield Way(rows)
        rows = -(-rows // 2)
    yield Way(1)
    yield Way(1, "int8")
    if tokens > FEWER_MLP_TOKENS:
        yield Way(1, "int8", FEWER_MLP_TOKENS)
    if weights in PACKED:
        yield Way(1, "int8", None, True)
