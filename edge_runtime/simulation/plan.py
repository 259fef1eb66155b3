"""The plan of a study: its runs in the order in which they are made, and the seconds that each takes.

A missing run is expected to take as long as the finished runs of its arm, by median. Where there are
none, it is expected to take as long as the runs of the study's other arms, and marked.
"""

import statistics
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_runtime.simulation.results import Outcomes
from edge_runtime.simulation.spec import Arm, Spec


class Expected(NamedTuple):
    """What a missing run takes."""

    seconds: float  # 0: no run of the study is finished, so nothing tells
    measured: bool  # by runs of the same arm


def missing(spec: Spec, outcomes: Outcomes) -> list[tuple[Arm, int]]:
    """The runs to make, seed by seed so that every arm has its first result early."""
    return [(arm, seed) for seed in spec.study.seeds for arm in spec.arm if (arm.name, seed) not in outcomes]


def expected(name: str, outcomes: Outcomes) -> Expected:
    """What a run of the arm takes."""
    of_arm = [outcome.seconds for (arm, _), outcome in outcomes.items() if arm == name]
    of_all = [outcome.seconds for outcome in outcomes.values()] or [0.0]
    return Expected(statistics.median(of_arm or of_all), bool(of_arm))


def show(spec: Spec, outcomes: Outcomes, hours: float, workers: int) -> None:
    """Print the seconds of each run, and which of the missing runs fit into hours of so many cores."""
    cells = {key: f"{outcome.seconds:.0f}" for key, outcome in outcomes.items()}
    total, fitting = 0.0, 0
    for arm, seed in missing(spec, outcomes):
        seconds, measured = expected(arm.name, outcomes)
        fits = total + seconds <= 3600 * hours * workers
        total, fitting = total + seconds, fitting + fits
        cells[arm.name, seed] = (
            ("+" if fits else "-") + f" {seconds:.0f}" * (seconds > 0) + " ?" * (not measured)
        )
    table = Table("arm", *(f"seed {seed}" for seed in spec.study.seeds))
    for arm in spec.arm:
        table.add_row(Text(arm.name), *(cells[arm.name, seed] for seed in spec.study.seeds))
    console = Console(width=100)
    console.print(table)
    console.print(
        f"Seconds of finished runs; + of missing runs that fit into {hours:g} h of {workers} cores, - of those "
        f"that do not; ? by other arms' runs, or unknown. Missing: {total / 3600:.1f} h of one core; {fitting} "
        "runs fit."
    )
