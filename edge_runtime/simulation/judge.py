"""How sure a difference between an arm and its control is.

A difference is the mean of d(s, r) over seeds s and held-out rows r: the share of the devices of the
row's task that answer the row right in the arm, less the same of the control. All seeds and arms are
asked the same rows.

    resamples   rows and, apart from them, seeds are drawn with replacement [1]; a seed is drawn whole.
                What is drawn differs from its mean by the root of S / (S - 1) as much, since S seeds
                drawn of S vary too little [2].
    p           twice the share of resamples on the other side of 0
    correction  of m comparisons, the i-th smallest p counts m - i + 1 times, and no less than those
                before it [3]
    interval    at 1 - 0.05 / the factor by which p was raised: it excludes 0 where the corrected p
                is below 0.05, and nowhere else

An interval of two or three seeds covers less than it says where seeds differ by more than rows do.

Sources: [1] Owen 2007, The pigeonhole bootstrap. [2] Rao and Wu 1988, Resampling inference with
complex survey data. [3] Holm 1979, A simple sequentially rejective multiple test procedure.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.simulation.results import Kind, Outcome, Outcomes, of_kind, unpacked
from edge_runtime.simulation.spec import Spec

RESAMPLES = 10_000
LEVEL = 0.05
Differences = NDArray[np.float64]  # (seeds, rows)
Resamples = NDArray[np.float64]  # (RESAMPLES,)


class Certainty(NamedTuple):
    """How sure a difference is, corrected for the number of comparisons."""

    low: float  # ends of the interval
    high: float
    p: float


class Comparison(NamedTuple):
    """An arm less its control, as a share of the held-out rows of a kind."""

    arm: str
    control: str
    kind: Kind | None  # None: all rows
    seeds: tuple[int, ...]
    difference: float
    certainty: Certainty | None  # None: settings of the arm or its control were chosen on this seed


def comparisons(spec: Spec, outcomes: Outcomes) -> list[Comparison]:
    """Each arm beside its control, on all rows and on those of unseen labels where there are any.

    Seeds that settings of the arm or the control were chosen on are compared apart, without a claim.
    Comparisons in which no row differs are left out.
    """
    drawn = list(_compared(spec, outcomes))
    factors = iter(holm([p_value(resamples) for _, resamples in drawn if resamples is not None]))
    return [
        comparison
        if resamples is None
        else comparison._replace(certainty=_certainty(resamples, next(factors)))
        for comparison, resamples in drawn
    ]


def _compared(spec: Spec, outcomes: Outcomes) -> Iterator[tuple[Comparison, Resamples | None]]:
    """The comparisons without their claims, and resamples of those that make one."""
    chosen_on = {arm.name: arm.chosen_on for arm in spec.arm}
    kinds: tuple[Kind | None, ...] = (None, "unseen")
    for arm in spec.arm:
        control = arm.control or ""
        paired = [seed for name, seed in outcomes if name == arm.name and (control, seed) in outcomes]
        chosen = [seed for seed in paired if seed in (arm.chosen_on, chosen_on.get(control))]
        for seeds in ([seed for seed in paired if seed not in chosen], chosen):
            for kind in kinds:
                parts = _differences(arm.name, control, seeds, kind, outcomes)
                if any(part.any() for part in parts):
                    mean = sum(float(part.mean()) for part in parts)
                    resamples = resampled(parts) if seeds is not chosen else None
                    yield Comparison(arm.name, control, kind, tuple(seeds), mean, None), resamples


def _certainty(resamples: Resamples, factor: float) -> Certainty:
    return Certainty(*interval(resamples, factor), min(factor * p_value(resamples), 1.0))


def _differences(
    arm: str, control: str, seeds: Sequence[int], kind: Kind | None, outcomes: Outcomes
) -> list[Differences]:
    """d(s, r) of each task, (seeds, rows), weighted so that the tasks' means add up to the mean over devices."""
    by_task: dict[str, list[NDArray[np.float64]]] = {}
    for seed in seeds:
        treated, untreated = (_rates(outcomes[name, seed], kind) for name in (arm, control))
        for task in treated.keys() & untreated.keys():
            by_task.setdefault(task, []).append(treated[task] - untreated[task])
    return [np.stack(rows) for _, rows in sorted(by_task.items())]


def _rates(outcome: Outcome, kind: Kind | None) -> dict[str, NDArray[np.float64]]:
    """What each held-out row (rows,) of a task adds to the mean accuracy, times the number of rows."""
    asked = [(member, of_kind(member, kind)) for member in outcome.members]
    asked = [(member, rows) for member, rows in asked if rows.any()]
    rates: dict[str, NDArray[np.float64]] = {}
    for member, rows in asked:
        right = rows & unpacked(member.hits, member.held_out)
        rates[member.data] = rates.get(member.data, 0) + right * (len(rows) / rows.sum() / len(asked))
    return rates


def resampled(parts: Sequence[Differences]) -> Resamples:
    """The difference in each resample (RESAMPLES,); equal arguments give equal resamples."""
    draw = np.random.default_rng(0)
    seeds = len(parts[0])
    weights = draw.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    if seeds > 1:
        weights = 1 / seeds + (weights - 1 / seeds) * np.sqrt(seeds / (seeds - 1))
    total = np.zeros(RESAMPLES)
    for part in parts:
        # rows that differ alike are drawn together: they are few kinds
        patterns, counts = np.unique(part, axis=1, return_counts=True)
        rows = draw.multinomial(part.shape[1], counts / part.shape[1], RESAMPLES)
        total += (rows @ patterns.T / part.shape[1] * weights).sum(1)
    return total


def p_value(resamples: Resamples) -> float:
    """Of no difference, two-sided, for one comparison."""
    other_side = min((resamples <= 0).sum(), (resamples >= 0).sum())
    return min(2 * float(other_side + 1) / (len(resamples) + 1), 1.0)


def interval(resamples: Resamples, factor: float) -> tuple[float, float]:
    """Low and high end, 0 outside where `factor` times the p value is below LEVEL."""
    beyond = max(math.ceil(LEVEL / factor * (len(resamples) + 1) / 2) - 2, 0)
    low, high = np.sort(resamples)[[beyond, -1 - beyond]]
    return float(low), float(high)


def holm(ps: Sequence[float]) -> list[float]:
    """The factor of each p, at least 1, that corrects it for the number of comparisons."""
    factors, raised = [1.0] * len(ps), 0.0
    for place, number in enumerate(sorted(range(len(ps)), key=lambda number: ps[number])):
        raised = max(raised, (len(ps) - place) * ps[number])
        factors[number] = raised / ps[number]
    return factors
