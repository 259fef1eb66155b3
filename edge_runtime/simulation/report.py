"""What a study found: a table, as text and as Markdown, and three pictures."""

import datetime
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_runtime.simulation.run import Member, Outcome, accuracy
from edge_runtime.simulation.spec import Arm, Spec

COLUMNS = (
    "arm",
    "accuracy",
    "by model",
    "unseen labels",
    "against",
    "difference",
    "cosine",
    "KB up",
    "KB down",
    "trained",
    "seeds",
)
Outcomes = Mapping[tuple[str, int], Outcome]


class Difference(NamedTuple):
    """Of an arm to its control, paired by seed: mean, and half of its 95 % interval; nan where there is one pair."""

    mean: float
    half: float


def difference(arm: Arm, outcomes: Outcomes, seeds: tuple[int, ...]) -> Difference | None:
    """None where no seed has both."""
    from scipy.stats import t

    pairs = [
        (outcomes[arm.name, seed].accuracy, outcomes[arm.control, seed].accuracy)
        for seed in seeds
        if arm.control and (arm.name, seed) in outcomes and (arm.control, seed) in outcomes
    ]
    if not pairs:
        return None
    gained = [own - control for own, control in pairs]
    if len(gained) < 2:
        return Difference(gained[0], math.nan)
    half = float(t.ppf(0.975, len(gained) - 1)) * statistics.stdev(gained) / math.sqrt(len(gained))
    return Difference(statistics.mean(gained), half)


def rows(spec: Spec, outcomes: Outcomes) -> list[tuple[str, ...]]:
    """The table's rows, a line an arm that has a run."""
    found: list[tuple[str, ...]] = []
    for arm in spec.arm:
        own = _runs(spec, arm, outcomes)
        if not own:
            continue
        members = own[0].members
        by_model = [
            _percent(
                [_mean([accuracy(m, -1) for m in one.members if kind(m) == same]) for one in own],
                spread=False,
            )
            for same in sorted({kind(member) for member in members})
        ]
        unseen = [_mean([accuracy(m, -1, "unseen") for m in one.members]) for one in own]
        against = difference(arm, outcomes, spec.study.seeds)
        found.append(
            (
                arm.name,
                _percent([one.accuracy for one in own]),
                " / ".join(by_model),
                "" if any(map(math.isnan, unseen)) else _percent(unseen),
                arm.control or "",
                "" if against is None else _points(against),
                _agreement([pair for one in own for pair in one.cosines]),
                _kilobytes([_mean(m.bytes_up) for m in members]),
                _kilobytes([_mean(m.bytes_down) for m in members]),
                f"{_mean([m.trained_values for m in members]) / 1e6:.2f} M",
                ", ".join(str(one.seed) for one in own),
            )
        )
    return found


def show(spec: Spec, outcomes: Outcomes, name: str) -> None:
    """Print the table."""
    table = Table(*COLUMNS, title=name)
    for row in rows(spec, outcomes):
        table.add_row(*map(Text, row))
    Console(width=160).print(table)


def write(spec: Spec, outcomes: Outcomes, name: str, out: Path) -> None:
    """The table as Markdown and the pictures, in the folder."""
    lines = [f"# {name}", "", spec.study.about.strip(), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(spec, outcomes)]
    seconds = statistics.median([one.seconds for one in outcomes.values()]) if outcomes else 0
    made = Counter(one.code or "code that was not told" for one in outcomes.values())
    machines = sorted({one.machine for one in outcomes.values()} - {""})
    lines += [
        "",
        "Accuracy: mean over the devices after the last round, mean and standard deviation over seeds. By model: "
        + ", ".join(
            f"{layers} layers of {model_class} on {data}"
            for model_class, layers, data in sorted(
                {kind(m) for one in outcomes.values() for m in one.members}
            )
        )
        + ". Unseen labels: those that a device holds no rows of. Difference: in points, to the arm named before it with the "
        "same seed, with its 95 % interval (Student's t over seeds; all are asked the same held-out rows). Cosine: between the "
        "models' mean steps of what crosses them, mean over tensors and rounds, and the share below 0. KB: a device and "
        "round, as encoded, mean over the rounds of the first seed, without public texts and the last version; trained: "
        "values of a device's adapter, without its head.",
        "",
        f"A run took {seconds:.0f} s (median) on one core of {', '.join(machines) or 'a machine not told'}. Runs by what made "
        "them: "
        + "; ".join(f"{count} by {code}" for code, count in sorted(made.items()))
        + f". {datetime.date.today().isoformat()}, `edge-runtime study studies/{name}.toml`.",
        "",
        "![Accuracy over rounds](rounds.svg) ![Accuracy against bytes](bytes.svg)",
        "",
        "Convergence: the squared norm of what a round changes of adapters and heads in all versions, and the slope of a line "
        "fitted to it over rounds, both in logarithms. The learning rate falls to a tenth over the rounds, which is part of the "
        "slope. Methods whose versions have their product in other factors each round are left out.",
        "",
        "![Squared norm of the averaged update over rounds](convergence.svg)",
        "",
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")
    _pictures(spec, outcomes, out)


def kind(member: Member) -> tuple[str, int, str]:
    """What devices have in common whose mean accuracy is one number of `by model`."""
    return member.model_class, member.depth, member.data


def _runs(spec: Spec, arm: Arm, outcomes: Outcomes) -> list[Outcome]:
    return [outcomes[arm.name, seed] for seed in spec.study.seeds if (arm.name, seed) in outcomes]


def _pictures(spec: Spec, outcomes: Outcomes, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # equal results give equal files
    from matplotlib import pyplot

    over, against, moved = (pyplot.subplots(figsize=(7, 5)) for _ in range(3))
    for number, arm in enumerate(spec.arm):
        own = _runs(spec, arm, outcomes)
        if not own:
            continue
        rounds = len(own[0].members[0].scores)
        means = [
            100 * _mean([_mean([accuracy(m, r) for m in one.members]) for one in own]) for r in range(rounds)
        ]
        style: Any = {"color": f"C{number % 10}", "marker": "osv^Dx"[number // 10 % 6], "label": arm.name}
        over[1].plot(range(rounds), means, **style)
        sent = _mean([sum(m.bytes_up) + sum(m.bytes_down) for m in own[0].members]) / 1e6
        against[1].scatter([sent], means[-1:], **style)
        norms = [_mean(list(each)) for each in zip(*(one.moved for one in own if one.moved), strict=True)]
        if len(norms) > 1 and all(norms):
            moved[1].loglog(range(1, rounds), norms, **{**style, "label": f"{arm.name}: {slope(norms):+.2f}"})
    over[1].set(xlabel="rounds done", ylabel="accuracy, %", title="Accuracy over rounds")
    against[1].set(xlabel="MB a device, all rounds", ylabel="accuracy, %", title="Accuracy against bytes")
    moved[1].set(
        xlabel="round", ylabel="squared norm of the averaged update", title="Convergence, with fitted slopes"
    )
    for (figure, axes), name in ((over, "rounds"), (against, "bytes"), (moved, "convergence")):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def slope(norms: list[float]) -> float:
    """Of a straight line through the logarithms of what each round, counted from 1, has."""
    logs = [math.log(number) for number in range(1, len(norms) + 1)]
    return statistics.linear_regression(logs, [math.log(norm) for norm in norms]).slope


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percent(values: list[float], *, spread: bool = True) -> str:
    around = f" ± {100 * statistics.stdev(values):.1f}" if spread and len(values) > 1 else ""
    return f"{100 * _mean(values):.1f}{around}"


def _points(found: Difference) -> str:
    around = "" if math.isnan(found.half) else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:+.1f}{around}"


def _agreement(pairs: list[tuple[float, float]]) -> str:
    return (
        f"{_mean([one for one, _ in pairs]):+.2f}, {100 * _mean([one for _, one in pairs]):.0f} % < 0"
        if pairs
        else ""
    )


def _kilobytes(values: list[float]) -> str:
    return f"{_mean(values) / 1e3:.0f}"
