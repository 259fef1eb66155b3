"""The report of a study: a table of the arms and one of their differences, as text and as Markdown."""

import datetime
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_runtime.simulation import judge, pictures
from edge_runtime.simulation.judge import Comparison
from edge_runtime.simulation.results import Kind, Member, Outcome, Outcomes, mean, mean_accuracy
from edge_runtime.simulation.spec import Arm, Spec

Line = dict[str, str]  # cells by column
WIDTH = 100  # characters of a printed table
WRAPPED = ("arm", "against", "by model", "cosine")  # columns whose cells may take several lines
NAME_WIDTH = 12  # at least, so that names break between words
LEGEND = {  # by column
    "accuracy": "mean over the devices after the last round, asked all held-out rows; mean and standard\n"
    "  deviation over seeds, in percent.",
    "by model": "{kinds}.",
    "unseen": "accuracy on rows of labels that a device holds no rows of.",
    "round 2": "the same after two rounds, on a sample of the rows. In the first round devices have nothing of\n"
    "  each other yet: they make their first predictions, or the frame.",
    "ceiling": "accuracy, on unseen labels where there are any, as a share of that of all data in one place.",
    "cosine": "between the models' mean steps of the tensors that cross them, mean over tensors and\n"
    "  rounds, and the share below 0.",
    "KB up/down": "of a device in a round, as encoded, mean over the rounds of the first seed, without\n"
    "  public texts and the last version.",
    "trained": "values of a device's adapter, without its head.",
    "seeds": "a line with a * is of the seed that the arm's settings were chosen on, the line above of the\n"
    "  others.",
}
DIFFERENCES = """\
- points: difference to the arm under `against` with the same seeds and rows, and its 95 % interval by
  bootstrap over seeds and rows. Interval and p are corrected for the number of comparisons in this
  table (Holm). With one seed the interval covers the rows alone.
- An arm is compared on the seeds that neither its settings nor those of its control were chosen on. A
  line with a * has the difference on the seed that they were chosen on, without a claim.
"""
CONVERGENCE = """\
Convergence: the squared norm of a round's change of adapters and heads, over all versions, and the
slope of a line fitted to it over rounds, both in logarithms. The learning rate falls to a tenth
over the rounds, which is part of the slope. Methods whose versions have the same product in other
factors each round are left out.
"""


def tables(spec: Spec, outcomes: Outcomes) -> tuple[list[Line], list[Line]]:
    """The arms that have runs, and the differences to their controls.

    An arm that was chosen on a seed has a line of the other seeds, and one of that seed. A column
    that is empty in every line is left out.
    """
    arms = [_line(arm, runs, outcomes, spec) for arm in spec.arm for runs in _parts(arm, outcomes)]
    differences = [_difference(each) for each in judge.comparisons(spec, outcomes)]
    return _without_empty(arms), _without_empty(differences)


def show(spec: Spec, outcomes: Outcomes, name: str) -> None:
    """Print the tables."""
    for title, lines in zip((name, "differences"), tables(spec, outcomes), strict=True):
        printed = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in next(iter(lines), {}):
            named = column in ("arm", "against")
            printed.add_column(column, no_wrap=column not in WRAPPED, min_width=NAME_WIDTH if named else None)
        for line in lines:
            printed.add_row(*map(Text, line.values()))
        Console(width=WIDTH).print(printed)


def write(spec: Spec, outcomes: Outcomes, name: str, out: Path) -> None:
    """Write the tables to README.md in the folder, and the pictures beside it."""
    arms, differences = tables(spec, outcomes)
    sections = [f"# {name}\n", spec.study.about.strip() + "\n"]
    if not outcomes:
        sections.append("No run of this study is done yet.\n")
    else:
        kinds = sorted({kind(member) for run in outcomes.values() for member in run.members})
        names = [f"{layers} layers of {model_class} on {data}" for model_class, layers, data in kinds]
        legend = [f"- {column}: {LEGEND[column]}\n" for column in arms[0] if column in LEGEND]
        sections += [_markdown(arms), "".join(legend).format(kinds=", ".join(names))]
    if differences:
        sections += [_markdown(differences), DIFFERENCES]
    if outcomes:
        sections.append(_origin(outcomes))
    for picture in pictures.draw(spec, outcomes, out):
        sections += [CONVERGENCE] * (picture == "convergence")
        sections.append(f"![{pictures.TITLES[picture][0]}]({picture}.svg)\n")
    command = f"`edge-runtime study studies/{name}.toml`"
    sections.append(f"Written on {datetime.date.today().isoformat()} by {command}.\n")
    (out / "README.md").write_text("\n".join(sections), encoding="utf-8")


def kind(member: Member) -> tuple[str, int, str]:
    """Devices alike in this share one number of the column `by model`."""
    return member.model_class, member.depth, member.data


def _parts(arm: Arm, outcomes: Outcomes) -> list[list[Outcome]]:
    """An arm's runs; those of the seed that it was chosen on are apart."""
    runs = [run for run in outcomes.values() if run.arm == arm.name]
    parts = (
        [run for run in runs if run.seed != arm.chosen_on],
        [run for run in runs if run.seed == arm.chosen_on],
    )
    return [part for part in parts if part]


def _line(arm: Arm, runs: list[Outcome], outcomes: Outcomes, spec: Spec) -> Line:
    members = runs[0].members
    by_model = [
        mean([mean_accuracy([m for m in run.members if kind(m) == alike]) for run in runs])
        for alike in sorted({kind(member) for member in members})
    ]
    after_2 = [mean_accuracy(run.members, "unseen", 3) for run in runs if len(members[0].answers) > 2]
    up, down = [mean(m.bytes_up) for m in members], [mean(m.bytes_down) for m in members]
    cosine = ""
    if agreements := [pair for run in runs for pair in run.cosines]:
        average, below_0 = map(mean, zip(*agreements, strict=True))
        cosine = f"{average:+.2f}, {100 * below_0:.0f} % < 0"
    return {
        "arm": arm.name + " *" * (runs[0].seed == arm.chosen_on),
        "accuracy": _percent([run.accuracy for run in runs]),
        "by model": " / ".join(f"{100 * share:.1f}" for share in by_model),
        "unseen": _percent([mean_accuracy(run.members, "unseen") for run in runs]),
        "round 2": _percent(after_2),
        "ceiling": _of_the_ceiling(runs, outcomes, spec),
        "cosine": cosine,
        "KB up/down": "/".join(f"{mean(each) / 1e3:.0f}" for each in (up, down)),
        "trained": f"{mean([member.trained_values for member in members]) / 1e6:.2f} M",
        "seeds": ", ".join(str(run.seed) for run in runs),
    }


def _of_the_ceiling(runs: list[Outcome], outcomes: Outcomes, spec: Spec) -> str:
    """The accuracy as a share of that of the first pooled arm; empty where it lacks one of the seeds."""
    pooled = next((arm.name for arm in spec.arm if arm.pooled), "")
    ceiling = [outcomes[pooled, run.seed] for run in runs if (pooled, run.seed) in outcomes]
    if len(ceiling) < len(runs):
        return ""
    kinds: tuple[Kind | None, ...] = ("unseen", None)
    for asked in kinds:
        means = [mean([mean_accuracy(run.members, asked) for run in part]) for part in (runs, ceiling)]
        if not any(map(math.isnan, means)) and means[1]:
            return f"{100 * means[0] / means[1]:.0f} %"
    return ""


def _difference(comparison: Comparison) -> Line:
    points, p, certainty = f"{100 * comparison.difference:+.1f}", "", comparison.certainty
    if certainty is not None:
        points += f" [{100 * certainty.low:+.1f}, {100 * certainty.high:+.1f}]"
        p = f"{certainty.p:.3f}" if certainty.p >= 0.001 else "< 0.001"
    return {
        "arm": comparison.arm + " *" * (certainty is None),
        "against": comparison.control,
        "rows": comparison.kind or "all",
        "points": points,
        "p": p,
        "seeds": ", ".join(map(str, comparison.seeds)),
    }


def _without_empty(lines: list[Line]) -> list[Line]:
    filled = {column for line in lines for column, cell in line.items() if cell}
    return [{column: cell for column, cell in line.items() if column in filled} for line in lines]


def _markdown(lines: list[Line]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _percent(shares: Sequence[float]) -> str:
    """Mean and standard deviation; empty where there is none, or a run has no such rows."""
    if not shares or any(map(math.isnan, shares)):
        return ""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.1f}{spread}"


def _origin(outcomes: Outcomes) -> str:
    """How long runs took, where, and by which versions of the code."""
    runs = outcomes.values()
    seconds = statistics.median([run.seconds for run in runs])
    machines = ", ".join(sorted({run.machine for run in runs}))
    counts = Counter(run.code for run in runs)
    versions = "; ".join(f"{count} by {version}" for version, count in sorted(counts.items()))
    return f"A run took {seconds:.0f} s (median) of one core of {machines}. Runs: {versions}.\n"
