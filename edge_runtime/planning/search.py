"""Picks what a device trains within its budget.

The first model of the catalog that fits, then the most precise weights, the longest sequence, the highest rank, and last the
largest micro-batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from edge_profiles import format_size

from edge_runtime.errors import BudgetError, InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.predict import LENGTH_STEP, terms
from edge_runtime.settings import PACKED, Boundaries, Fleet, Weights

UNPACKED_FAMILIES = ("gpt2",)  # their linear layers are no nn.Linear


class Choice(NamedTuple):
    """What fits, and what was preferred but is too large.

    fits: the winner. rejected: the smallest plan of each model and format before the winner's. better: the plan of the
    winner's model that comes right before it; None where the winner is the first of its model.
    """

    fits: Plan
    rejected: list[Plan]
    better: Plan | None


def choose(fleet: Fleet, facts: dict[str, Facts], budget_bytes: int, runtime_bytes: int) -> Choice:
    """The best plan within a budget.

    Args:
        fleet: its catalog is in order of preference.
        facts: of each source in the catalog.
        budget_bytes: what the trainer process may take at its peak, the runtime included.
        runtime_bytes: the measured baseline of this device.

    Raises:
        BudgetError: nothing fits; it says the smallest budget that would do.
        InputError: a depth that a model has not, or lengths that are all too long for it.
    """
    rejected: list[Plan] = []
    before: Plan | None = None
    for plans in candidates(fleet, facts, runtime_bytes):
        for way in plans:
            if way.predicted_peak_bytes <= budget_bytes:
                same = before is not None and (before.source, before.depth) == (way.source, way.depth)
                return Choice(way, rejected, before if same else None)
            before = way
        rejected.append(min(plans, key=lambda way: way.predicted_peak_bytes))
    least = min(rejected, key=lambda way: way.predicted_peak_bytes)
    raise BudgetError(
        f"a budget of {format_size(budget_bytes)} is too small for every model of the catalog; the smallest that would fit is "
        f"{least.source} with {least.depth} layers in {least.weights}, rank {least.rank} and {least.tokens} tokens, which needs "
        f"{format_size(least.predicted_peak_bytes)}"
    )


def candidates(fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int) -> Iterator[list[Plan]]:
    """For each model and weight format in order of preference, its plans in order of preference: from the longest sequence,
    highest rank and largest micro-batch to the shortest, the lowest and a single row with 8-bit boundaries and, where they
    are packed, streamed weights.

    Lengths above a model's positions are left out, unless all are.
    """
    training, adapter = fleet.training, fleet.adapter
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
                    rows=rows,
                    boundaries=boundaries,
                    streamed=streamed,
                    runtime_bytes=runtime_bytes,
                )
                for tokens in possible
                for rank in (adapter.rank, *adapter.lower)
                for rows, boundaries, streamed in _ways(training.rows_a_step, weights)
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
    rows: int,
    boundaries: Boundaries,
    streamed: bool,
    runtime_bytes: int,
    lengths: int | None = None,
) -> Plan:
    """One way to train a model, with what is predicted for it.

    Args:
        lengths: of the rows, after padding; None: all there are up to `tokens`.

    Raises:
        InputError: a sequence is longer than the model has positions, its family cannot be packed, or weights that are not
            packed are to be streamed.
    """
    if tokens > known.positions:
        key = "shorter goes down to" if tokens in fleet.training.shorter else "max_tokens is"
        raise InputError(f"[training] {key} {tokens}, but {source} has {known.positions} positions")
    if weights in PACKED and known.family in UNPACKED_FAMILIES:
        raise InputError(
            f"{source} is a {known.family} model, whose matrices cannot be packed: use float32 or bfloat16"
        )
    if streamed and weights not in PACKED:
        raise InputError(f"weights in {weights} cannot be streamed: use one of {', '.join(PACKED)}")
    way = Plan(
        source=source,
        model_class=known.model_class,
        depth=depth,
        layers=known.layers,
        weights=weights,
        rank=rank,
        rows=rows,
        tokens=tokens,
        terms={},
        boundaries=boundaries,
        streamed=streamed,
    )
    predicted = terms(
        known,
        way,
        roles=fleet.adapter.roles,
        rows_a_step=fleet.training.rows_a_step,
        lengths=lengths or -(-tokens // LENGTH_STEP),
        runtime_bytes=runtime_bytes,
    )
    return msgspec.structs.replace(way, terms=predicted)


def _ways(rows_a_step: int, weights: Weights) -> Iterator[tuple[int, Boundaries, bool]]:
    """Micro-batches, boundaries and whether the weights are streamed, from the fastest and most exact to the smallest."""
    rows = rows_a_step
    while rows > 1:
        yield rows, "input", False
        rows = -(-rows // 2)
    yield 1, "input", False
    yield 1, "int8", False
    if weights in PACKED:
        yield 1, "int8", True
