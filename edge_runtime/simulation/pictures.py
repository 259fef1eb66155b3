"""The pictures of a study: accuracy over rounds and against bytes, and how the updates shrink.

Before each round devices are asked a sample of the held-out rows, and after the last round all.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from edge_runtime.simulation.results import Kind, Outcome, Outcomes, mean, mean_accuracy
from edge_runtime.simulation.spec import Arm, Spec

TITLES = {
    "rounds": ("Accuracy over rounds", "rounds done", "accuracy, %"),
    "unseen": ("Accuracy on unseen labels over rounds", "rounds done", "accuracy, %"),
    "bytes": ("Accuracy against bytes", "MB a device, all rounds", "accuracy, %"),
    "convergence": ("Convergence, with fitted slopes", "round", "squared norm of the averaged update"),
}
KINDS: dict[str, Kind | None] = {"rounds": None, "unseen": "unseen"}
MARKERS = "osv^Dx"


def draw(spec: Spec, outcomes: Outcomes, out: Path) -> list[str]:
    """Write the pictures as NAME.svg in the folder, a curve or a point for each arm that has a run.

    A picture with nothing to show is deleted. Returns the names of the others.
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
            _plot(axes, arm, runs, style)
    shown = [name for name, axis in axes.items() if axis.has_data()]
    for name, (figure, axis) in figures.items():
        path = out / f"{name}.svg"
        path.unlink(missing_ok=True)
        if name in shown:
            title, x, y = TITLES[name]
            axis.set(title=title, xlabel=x, ylabel=y)
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
            figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return shown


def _plot(axes: dict[str, Any], arm: Arm, runs: list[Outcome], style: dict[str, Any]) -> None:
    """Draw one arm into each picture."""
    befores = range(1, len(runs[0].members[0].answers) + 1)
    rounds = [*(before - 1 for before in befores), len(befores)]
    for name, kind in KINDS.items():
        points = [
            mean([mean_accuracy(run.members, kind, before) for run in runs]) for before in (*befores, None)
        ]
        shares = [100 * share for share in points]
        if not any(map(math.isnan, shares)):
            axes[name].plot(rounds, shares, label=arm.name, **style)
    megabytes = mean([sum(m.bytes_up) + sum(m.bytes_down) for m in runs[0].members]) / 1e6
    axes["bytes"].scatter([megabytes], [100 * mean([run.accuracy for run in runs])], label=arm.name, **style)
    norms = [mean(norms) for norms in zip(*(run.moved for run in runs if run.moved), strict=True)]
    if len(norms) > 1 and all(norms):
        label = f"{arm.name}: {slope(norms):+.2f}"
        axes["convergence"].loglog(range(1, len(norms) + 1), norms, label=label, **style)


def slope(norms: list[float]) -> float:
    """Slope of log(norm) over log(round), by least squares; rounds are counted from 1."""
    rounds = [math.log(round_) for round_ in range(1, len(norms) + 1)]
    return statistics.linear_regression(rounds, [math.log(norm) for norm in norms]).slope
