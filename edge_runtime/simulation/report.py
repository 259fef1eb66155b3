"""The report of a study: a table, as text and as Markdown, beside three pictures."""

import datetime
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_runtime.simulation import pictures
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
CONVERGENCE = """\
Convergence: the squared norm of a round's change of adapters and heads, over all versions, and the
slope of a line fitted to it over rounds, both in logarithms. The learning rate falls to a tenth
over the rounds, which is part of the slope. Methods whose versions have the same product in other
factors each round are left out.
"""
CAPTIONS = {
    "rounds": "Accuracy over rounds",
    "bytes": "Accuracy against bytes",
    "convergence": "Squared norm of the averaged update over rounds",
}


class Difference(NamedTuple):
    """Accuracy of an arm less that of its control, paired by seed."""

    mean: float
    half: float  # half of the 95 % interval; NaN with a single pair


def difference(arm: Arm, outcomes: Outcomes, seeds: tuple[int, ...]) -> Difference | None:
    """The difference of an arm to its control; None where no seed has runs of both."""
    from scipy.stats import t

    pairs = [
        (outcomes[arm.name, seed].accuracy, outcomes[arm.control, seed].accuracy)
        for seed in seeds
        if arm.control and (arm.name, seed) in outcomes and (arm.control, seed) in outcomes
    ]
    if not pairs:
        return None
    gains = [arm_accuracy - control for arm_accuracy, control in pairs]
    if len(gains) < 2:
        return Difference(gains[0], math.nan)
    half = float(t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / math.sqrt(len(gains))
    return Difference(statistics.mean(gains), half)


def table(spec: Spec, outcomes: Outcomes) -> list[dict[str, str]]:
    """The cells by column, a line for each arm that has a run."""
    runs = _by_arm(spec, outcomes)
    return [
        _line(arm, runs[arm.name], difference(arm, outcomes, spec.study.seeds))
        for arm in spec.arm
        if arm.name in runs
    ]


def show(spec: Spec, outcomes: Outcomes, name: str) -> None:
    """Print the table."""
    lines = table(spec, outcomes)
    printed = Table(*next(iter(lines), {}), title=name)
    for line in lines:
        printed.add_row(*map(Text, line.values()))
    Console(width=160).print(printed)


def write(spec: Spec, outcomes: Outcomes, name: str, out: Path) -> None:
    """Write the table to README.md in the folder, and the pictures beside it."""
    drawn = pictures.draw(spec, _by_arm(spec, outcomes), out)
    links = {picture: f"![{CAPTIONS[picture]}]({picture}.svg)\n" for picture in drawn}
    convergence = links.pop("convergence", None)
    sections = [f"# {name}\n", spec.study.about.strip() + "\n", _markdown(table(spec, outcomes))]
    if outcomes:
        sections += [LEGEND.format(kinds=_kinds(outcomes)), _origin(outcomes), "".join(links.values())]
    if convergence:
        sections += [CONVERGENCE, convergence]
    command = f"`edge-runtime study studies/{name}.toml`"
    sections.append(f"Written on {datetime.date.today().isoformat()} by {command}.\n")
    (out / "README.md").write_text("\n".join(sections), encoding="utf-8")


def kind(member: Member) -> tuple[str, int, str]:
    """Devices alike in this share one number of the column `by model`."""
    return member.model_class, member.depth, member.data


def _by_arm(spec: Spec, outcomes: Outcomes) -> dict[str, list[Outcome]]:
    """Each arm's runs in the order of the seeds; arms without a run are left out."""
    runs = {
        arm.name: [outcomes[arm.name, seed] for seed in spec.study.seeds if (arm.name, seed) in outcomes]
        for arm in spec.arm
    }
    return {name: of_arm for name, of_arm in runs.items() if of_arm}


def _line(arm: Arm, runs: list[Outcome], to_control: Difference | None) -> dict[str, str]:
    members = runs[0].members
    unseen = [mean([accuracy(member, -1, "unseen") for member in run.members]) for run in runs]
    return {
        "arm": arm.name,
        "accuracy": _percent([run.accuracy for run in runs]),
        "by model": " / ".join(_by_model(runs)),
        "unseen labels": "" if any(map(math.isnan, unseen)) else _percent(unseen),
        "against": arm.control or "",
        "difference": "" if to_control is None else _points(to_control),
        "cosine": _agreement([pair for run in runs for pair in run.cosines]),
        "KB up": _kilobytes([mean(member.bytes_up) for member in members]),
        "KB down": _kilobytes([mean(member.bytes_down) for member in members]),
        "trained": f"{mean([member.trained_values for member in members]) / 1e6:.2f} M",
        "seeds": ", ".join(str(run.seed) for run in runs),
    }


def _by_model(runs: list[Outcome]) -> list[str]:
    """Accuracy after the last round, of each kind of device."""
    return [
        f"{100 * mean([mean([accuracy(m, -1) for m in run.members if kind(m) == alike]) for run in runs]):.1f}"
        for alike in sorted({kind(member) for member in runs[0].members})
    ]


def _markdown(lines: list[dict[str, str]]) -> str:
    header = next(iter(lines), {})
    rows = [list(header), ["---"] * len(header), *(list(line.values()) for line in lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows if row)


def _kinds(outcomes: Mapping[tuple[str, int], Outcome]) -> str:
    kinds = sorted({kind(member) for outcome in outcomes.values() for member in outcome.members})
    return ", ".join(f"{layers} layers of {model_class} on {data}" for model_class, layers, data in kinds)


def _origin(outcomes: Outcomes) -> str:
    """How long runs took, where, and by which versions of the code."""
    seconds = statistics.median([outcome.seconds for outcome in outcomes.values()])
    machines = ", ".join(sorted({outcome.machine for outcome in outcomes.values()} - {""}))
    versions = Counter(outcome.code or "versions that were not recorded" for outcome in outcomes.values())
    counts = "; ".join(f"{count} by {version}" for version, count in sorted(versions.items()))
    return f"A run took {seconds:.0f} s (median) on one core of {machines or 'an unnamed processor'}. Runs: {counts}.\n"


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _points(to_control: Difference) -> str:
    half = "" if math.isnan(to_control.half) else f" ± {100 * to_control.half:.1f}"
    return f"{100 * to_control.mean:+.1f}{half}"


def _agreement(rounds: list[tuple[float, float]]) -> str:
    if not rounds:
        return ""
    cosine, below_0 = (mean(numbers) for numbers in zip(*rounds, strict=True))
    return f"{cosine:+.2f}, {100 * below_0:.0f} % < 0"


def _kilobytes(values: list[float]) -> str:
    return f"{mean(values) / 1e3:.0f}"
