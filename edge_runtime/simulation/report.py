"""The report of a study: a table, as text and as Markdown, and three pictures."""

import datetime
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_runtime.simulation.results import Member, Outcome, Outcomes, accuracy, mean
from edge_runtime.simulation.spec import Arm, Spec

LEGEND = """\
- accuracy: mean over the devices after the last round; mean and standard deviation over seeds.
- by model: {kinds}.
- unseen labels: accuracy on rows of labels that a device holds no rows of.
- difference: in points, to the arm under `against` with the same seed, and its 95 % interval
  (Student's t over seeds). All seeds are asked the same held-out rows.
- cosine: between the models' mean steps of the tensors that cross them, mean over tensors and
  rounds, and the share below 0.
- KB: of a device in a round, as encoded, mean over the rounds of the first seed, without public
  texts and the last version.
- trained: values of a device's adapter, without its head.
"""
PICTURES = """\
![Accuracy over rounds](rounds.svg)
![Accuracy against bytes](bytes.svg)
"""
CONVERGENCE = """\
Convergence: the squared norm of a round's change of adapters and heads, over all versions, and the
slope of a line fitted to it over rounds, both in logarithms. The learning rate falls to a tenth
over the rounds, which is part of the slope. Methods whose versions have the same product in other
factors each round are left out.

![Squared norm of the averaged update over rounds](convergence.svg)
"""
TITLES = {
    "rounds": ("Accuracy over rounds", "rounds done", "accuracy, %"),
    "bytes": ("Accuracy against bytes", "MB a device, all rounds", "accuracy, %"),
    "convergence": ("Convergence, with fitted slopes", "round", "squared norm of the averaged update"),
}
MARKERS = "osv^Dx"


class Difference(NamedTuple):
    """Accuracy of an arm less that of its control, paired by seed."""

    mean: float
    half: float  # half of the 95 % interval; NaN with a single pair


def difference(arm: Arm, outcomes: Outcomes) -> Difference | None:
    """The difference of an arm to its control; None where no seed has runs of both."""
    from scipy.stats import t

    control = arm.control or ""
    gains = [
        outcome.accuracy - outcomes[control, seed].accuracy
        for (name, seed), outcome in outcomes.items()
        if name == arm.name and (control, seed) in outcomes
    ]
    if not gains:
        return None
    if len(gains) < 2:
        return Difference(gains[0], math.nan)
    half = float(t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / math.sqrt(len(gains))
    return Difference(statistics.mean(gains), half)


def table(spec: Spec, outcomes: Outcomes) -> list[dict[str, str]]:
    """The cells by column, a line for each arm that has a run."""
    runs = {arm.name: [run for run in outcomes.values() if run.arm == arm.name] for arm in spec.arm}
    return [_line(arm, runs[arm.name], difference(arm, outcomes)) for arm in spec.arm if runs[arm.name]]


def show(spec: Spec, outcomes: Outcomes, name: str) -> None:
    """Print the table."""
    lines = table(spec, outcomes)
    printed = Table(*next(iter(lines), {}), title=name)
    for line in lines:
        printed.add_row(*map(Text, line.values()))
    Console(width=160).print(printed)


def write(spec: Spec, outcomes: Outcomes, name: str, out: Path) -> None:
    """Write the table to README.md in the folder, and the pictures beside it."""
    lines = table(spec, outcomes)
    header = next(iter(lines), {})
    rows = [header, ["---"] * len(header), *(line.values() for line in lines)]
    markdown = "".join("| " + " | ".join(row) + " |\n" for row in rows if row)
    sections = [f"# {name}\n", spec.study.about.strip() + "\n", markdown]
    if outcomes:
        kinds = sorted({kind(member) for run in outcomes.values() for member in run.members})
        names = [f"{layers} layers of {model_class} on {data}" for model_class, layers, data in kinds]
        sections += [LEGEND.format(kinds=", ".join(names)), _origin(outcomes), PICTURES]
    if _draw(spec, outcomes, out):
        sections.append(CONVERGENCE)
    command = f"`edge-runtime study studies/{name}.toml`"
    sections.append(f"Written on {datetime.date.today().isoformat()} by {command}.\n")
    (out / "README.md").write_text("\n".join(sections), encoding="utf-8")


def kind(member: Member) -> tuple[str, int, str]:
    """Devices alike in this share one number of the column `by model`."""
    return member.model_class, member.depth, member.data


def _line(arm: Arm, runs: list[Outcome], to_control: Difference | None) -> dict[str, str]:
    members = runs[0].members
    by_model = [
        mean([mean([accuracy(m, -1) for m in run.members if kind(m) == alike]) for run in runs])
        for alike in sorted({kind(member) for member in members})
    ]
    unseen = [mean([accuracy(member, -1, "unseen") for member in run.members]) for run in runs]
    gain = cosine = ""
    if to_control is not None:
        half = "" if math.isnan(to_control.half) else f" ± {100 * to_control.half:.1f}"
        gain = f"{100 * to_control.mean:+.1f}{half}"
    if agreements := [pair for run in runs for pair in run.cosines]:
        average, below_0 = map(mean, zip(*agreements, strict=True))
        cosine = f"{average:+.2f}, {100 * below_0:.0f} % < 0"
    return {
        "arm": arm.name,
        "accuracy": _percent([run.accuracy for run in runs]),
        "by model": " / ".join(f"{100 * share:.1f}" for share in by_model),
        "unseen labels": "" if any(map(math.isnan, unseen)) else _percent(unseen),
        "against": arm.control or "",
        "difference": gain,
        "cosine": cosine,
        "KB up": f"{mean([mean(member.bytes_up) for member in members]) / 1e3:.0f}",
        "KB down": f"{mean([mean(member.bytes_down) for member in members]) / 1e3:.0f}",
        "trained": f"{mean([member.trained_values for member in members]) / 1e6:.2f} M",
        "seeds": ", ".join(str(run.seed) for run in runs),
    }


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _origin(outcomes: Outcomes) -> str:
    """How long runs took, where, and by which versions of the code."""
    runs = outcomes.values()
    seconds = statistics.median([run.seconds for run in runs])
    machines = ", ".join(sorted({run.machine for run in runs} - {""})) or "an unnamed processor"
    versions = Counter(run.code or "versions that were not recorded" for run in runs)
    counts = "; ".join(f"{count} by {version}" for version, count in sorted(versions.items()))
    return f"A run took {seconds:.0f} s (median) on one core of {machines}. Runs: {counts}.\n"


def _draw(spec: Spec, outcomes: Outcomes, out: Path) -> bool:
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
            _plot(axes, arm, runs, style)
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


def _plot(axes: dict[str, Any], arm: Arm, runs: list[Outcome], style: dict[str, Any]) -> None:
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
