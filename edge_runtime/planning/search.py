"""Picks what a device trains: the first model of the catalog that fits its budget, then the best format, then the micro-batch."""

from collections.abc import Iterator
from typing import NamedTuple

from edge_profiles import format_size

from edge_runtime.errors import BudgetError, InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.predict import terms
from edge_runtime.settings import Fleet


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
        for plan in plans:
            if plan.predicted_peak_bytes <= budget_bytes:
                return Choice(plan, rejected)
        rejected.append(plans[-1])
    least = min(rejected, key=lambda plan: plan.predicted_peak_bytes)
    raise BudgetError(
        f"a budget of {format_size(budget_bytes)} is too small for every model of the catalog; the smallest that would fit is "
        f"{least.source} with {least.depth} layers in {least.weights}, which needs {format_size(least.predicted_peak_bytes)}"
    )


def candidates(fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int) -> Iterator[list[Plan]]:
    """For each model and weight format in order of preference, its plans from the largest micro-batch to a single row."""
    for model in fleet.catalog:
        known = facts[model.source]
        depth = known.layers if model.depth is None else model.depth
        if not 1 <= depth <= known.layers:
            raise InputError(f"the catalog wants {depth} layers of {model.source}, which has {known.layers}")
        if fleet.training.max_tokens > known.positions:
            raise InputError(
                f"[training] max_tokens is {fleet.training.max_tokens}, but {model.source} has {known.positions} positions"
            )
        for weights in model.weights:
            yield [
                Plan(
                    source=model.source,
                    model_class=known.model_class,
                    depth=depth,
                    layers=known.layers,
                    weights=weights,
                    rank=fleet.adapter.rank,
                    rows=rows,
                    tokens=fleet.training.max_tokens,
                    terms=terms(
                        known,
                        depth=depth,
                        weights=weights,
                        adapter=fleet.adapter,
                        rows=rows,
                        tokens=fleet.training.max_tokens,
                        runtime_bytes=runtime_bytes,
                    ),
                )
                for rows in _micro_batches(fleet.training.rows_a_step)
            ]


def _micro_batches(rows_a_step: int) -> Iterator[int]:
    rows = rows_a_step
    while rows > 1:
        yield rows
        rows = -(-rows // 2)
    yield 1
