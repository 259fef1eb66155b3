"""Three pictures of a study: accuracy over rounds, accuracy against bytes, and convergence."""

import math
import statistics
from pathlib import Path
from typing import Any

from edge_runtime.simulation.results import Outcome, Outcomes, accuracy, mean
from edge_runtime.simulation.spec import Arm, Spec

TITLES = {
    "rounds": ("Accuracy over rounds", "rounds done", "accuracy, %"),
    "bytes": ("Accuracy against bytes", "MB a device, all rounds", "accuracy, %"),
    "convergence": ("Convergence, with fitted slopes", "round", "squared norm of the averaged update"),
}
MARKERS = "osv^Dx"


def draw(spec: Spec, outcomes: Outcomes, out: Path) -> bool:
    """Write the pictures as NAME.svg in the folder, a curve or a point for each arm that has a run.

    A picture with nothing to show is deleted. Returns whether there is one of the convergence,
    which a method that merges nothing does not have.
    """
    import matplotlib

    matplotlib.use("svg")
    # equal results give equal files
    matplotlib.rcParams["svg.hashsalt"] = "study"
    # text instead of a path for each letter: a third of the size
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figures = {name: pyplot.subplots(figsize=(7, 5)) for name in TITLES}
    axes = {name: axis for name, (_, axis) in figures.items()}
    for number, arm in enumerate(spec.arm):
        if runs := [run for run in outcomes.values() if run.arm == arm.name]:
            style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}
            _add(axes, arm, runs, style)
    for name, (figure, axis) in figures.items():
        path = out / f"{name}.svg"
        path.unlink(missing_ok=True)
        if axis.has_data():
            title, x, y = TITLES[name]
            axis.set(title=title, xlabel=x, ylabel=y)
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
            figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return bool(axes["convergence"].has_data())


def _add(axes: dict[str, Any], arm: Arm, runs: list[Outcome], style: dict[str, Any]) -> None:
    """Draw one arm into each picture."""
    rounds = range(len(runs[0].members[0].answers))
    accuracies = [
        100 * mean([mean([accuracy(member, round_) for member in run.members]) for run in runs])
        for round_ in rounds
    ]
    axes["rounds"].plot(rounds, accuracies, label=arm.name, **style)
    megabytes = mean([sum(m.bytes_up) + sum(m.bytes_down) for m in runs[0].members]) / 1e6
    axes["bytes"].scatter([megabytes], accuracies[-1:], label=arm.name, **style)
    norms = [mean(norms) for norms in zip(*(run.moved for run in runs if run.moved), strict=True)]
    if len(norms) > 1 and all(norms):
        label = f"{arm.name}: {slope(norms):+.2f}"
        axes["convergence"].loglog(rounds[1:], norms, label=label, **style)


def slope(norms: list[float]) -> float:
    """Slope of log(norm) over log(round), by least squares; rounds are counted from 1."""
    rounds = [math.log(round_) for round_ in range(1, len(norms) + 1)]
    return statistics.linear_regression(rounds, [math.log(norm) for norm in norms]).slope
