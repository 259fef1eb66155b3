"""Picks what a device trains: the first model of the catalog that fits its budget, then the best format, then the micro-batch."""

from collections.abc import Iterator
from typing import NamedTuple

from edge_profiles import format_size

from edge_runtime.errors import BudgetError, InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.predict import terms
from edge_runtime.settings import PACKED, Boundaries, Fleet, Weights

UNPACKED_FAMILIES = ("gpt2",)  # their linear layers are no nn.Linear


class Choice(NamedTuple):
    """fits: the winner. rejected: for each model and format that was preferred, the smallest plan of it, which is too large."""

    fits: Plan
    rejected: list[Plan]


def choose(fleet: Fleet, facts: dict[str, Facts], budget_bytes: int, runtime_bytes: int) -> Choice:
    """The best plan within a budget.

    Args:
        fleet: its catalog is in order of preference.
        facts: of each source in the catalog.
        budget_bytes: what the trainer process may take at its peak, the runtime included.
        runtime_bytes: the measured baseline of this device.

    Raises:
        BudgetError: nothing fits; it says the smallest budget that would do.
        InputError: a depth or length that a model has not.
    """
    rejected: list[Plan] = []
    for plans in candidates(fleet, facts, runtime_bytes):
        for way in plans:
            if way.predicted_peak_bytes <= budget_bytes:
                return Choice(way, rejected)
        rejected.append(plans[-1])
    least = min(rejected, key=lambda way: way.predicted_peak_bytes)
    raise BudgetError(
        f"a budget of {format_size(budget_bytes)} is too small for every model of the catalog; the smallest that would fit is "
        f"{least.source} with {least.depth} layers in {least.weights}, which needs {format_size(least.predicted_peak_bytes)}"
    )


def candidates(fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int) -> Iterator[list[Plan]]:
    """For each model and weight format in order of preference, its plans from the largest micro-batch to a single row, and
    that with 8-bit boundaries."""
    for model in fleet.catalog:
        known = facts[model.source]
        depth = known.layers if model.depth is None else model.depth
        if not 1 <= depth <= known.layers:
            raise InputError(f"the catalog wants {depth} layers of {model.source}, which has {known.layers}")
        for weights in model.weights:
            yield [
                plan(fleet, known, model.source, depth, weights, rows, boundaries, runtime_bytes)
                for rows, boundaries in _ways(fleet.training.rows_a_step)
            ]


def plan(
    fleet: Fleet,
    known: Facts,
    source: str,
    depth: int,
    weights: Weights,
    rows: int,
    boundaries: Boundaries,
    runtime_bytes: int,
) -> Plan:
    """One way to train a model, with what is predicted for it.

    Raises:
        InputError: a sequence is longer than the model has positions, or its family cannot be packed.
    """
    if fleet.training.max_tokens > known.positions:
        raise InputError(
            f"[training] max_tokens is {fleet.training.max_tokens}, but {source} has {known.positions} positions"
        )
    if weights in PACKED and known.family in UNPACKED_FAMILIES:
        raise InputError(
            f"{source} is a {known.family} model, whose matrices cannot be packed: use float32 or bfloat16"
        )
    predicted = terms(
        known,
        depth=depth,
        weights=weights,
        adapter=fleet.adapter,
        rows=rows,
        rows_a_step=fleet.training.rows_a_step,
        tokens=fleet.training.max_tokens,
        boundaries=boundaries,
        runtime_bytes=runtime_bytes,
    )
    return Plan(
        source=source,
        model_class=known.model_class,
        depth=depth,
        layers=known.layers,
        weights=weights,
        rank=fleet.adapter.rank,
        rows=rows,
        tokens=fleet.training.max_tokens,
        terms=predicted,
        boundaries=boundaries,
    )


def _ways(rows_a_step: int) -> Iterator[tuple[int, Boundaries]]:
    """Micro-batches and boundaries, from the fastest and most exact to the smallest."""
    rows = rows_a_step
    while rows > 1:
        yield rows, "input"
        rows = -(-rows // 2)
    yield 1, "input"
    yield 1, "int8"
