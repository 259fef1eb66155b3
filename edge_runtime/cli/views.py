"""Tables that the commands show a person, and the values of `plan` as plain data for --json."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from edge_profiles import format_size
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edge_runtime.planning.search import Choice, over_deadline_s
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import failure

if TYPE_CHECKING:
    from edge_runtime.agent.measure import Measurement
    from edge_runtime.demo.outcome import DemoOutcome
    from edge_runtime.protocol.status import DeviceStatus, Status

MIB = 1 << 20
BAR = 40  # characters of a bar that stands for the budget
PLAN_FIELDS = (  # of a plan that does not fit, in --json
    *("source", "depth", "weights", "tokens", "rank", "rows", "boundaries", "mlp_tokens", "streamed"),
    *("kept_blocks", "predicted_peak_bytes", "serving_bytes", "step_seconds"),
)


def show_profile(values: dict[str, Any]) -> None:
    """A device, one fact a line; bytes as sizes."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name}: {_cell(name, part)}" for name, part in value.items())
        rows.append((_title(key), _cell(key, value)))
    _show("this device", ("fact", "value"), rows)


def show_measurement(measurement: "Measurement") -> None:
    """Predicted terms, measured memory of each phase, and peak and time beside PEFT's."""
    _show_terms(measurement.terms, measurement.predicted_peak_bytes)
    peft = measurement.peft
    runs = [measurement, *([peft] if peft else [])]
    phases = {
        f"{prefix}{name}": msgspec.structs.asdict(phase)
        for prefix, run in zip(("", "PEFT: "), runs, strict=False)
        for name, phase in run.phases.items()
    }
    # Views of memory that this machine has no figure for, such as a GPU's, are left out.
    columns = [
        key for key in next(iter(phases.values())) if any(row[key] is not None for row in phases.values())
    ]
    rows = [(name, *(_cell(key, row[key]) for key in columns)) for name, row in phases.items()]
    _show("measured", ("phase", *map(_title, columns)), rows)
    figures: list[tuple[str, list[float], Callable[[Any], str]]] = [
        ("peak", [run.measured_peak_bytes for run in runs], format_size),
        ("above the baseline", [run.measured_peak_bytes - run.baseline_bytes for run in runs], format_size),
        ("seconds a step", [run.step_seconds for run in runs], "{:.2f}".format),
    ]
    _show(
        "",
        ("", "Edge Runtime", *(["PEFT", "ratio"] if peft else [])),
        [
            (name, *map(text, values), *([f"{values[0] / values[1]:.2f}"] if peft else []))
            for name, values, text in figures
        ],
    )
    Console().print(
        f"predicted {format_size(measurement.predicted_peak_bytes)}, "
        f"measured {format_size(measurement.measured_peak_bytes)}: "
        f"{measurement.predicted_peak_bytes / measurement.measured_peak_bytes:.2f}; "
        f"baseline {format_size(measurement.baseline_bytes)}\n"
        f"a step predicted to take {measurement.predicted_step_seconds:.2f} s, "
        f"measured {measurement.step_seconds:.2f} s: "
        f"{measurement.predicted_step_seconds / measurement.step_seconds:.2f}",
        highlight=False,
    )


def plan_values(choice: Choice, budget_bytes: int, deadline_s: float | None) -> dict[str, Any]:
    """The plan that fits, and the preferred ones that are too large or too slow, as plain data."""

    def values(plan: Plan) -> dict[str, Any]:
        return {
            **{name: getattr(plan, name) for name in PLAN_FIELDS},
            "over_budget_bytes": max(0, plan.needed_bytes - budget_bytes),
            "over_deadline_s": over_deadline_s(plan, deadline_s),
        }

    return {
        "budget_bytes": budget_bytes,
        "step_deadline_s": deadline_s,
        "plan": choice.fits,
        "predicted_peak_bytes": choice.fits.predicted_peak_bytes,
        "rejected": [values(plan) for plan in choice.rejected],
        "better": values(choice.better) if choice.better else None,
    }


def show_plan(choice: Choice, budget_bytes: int, deadline_s: float | None) -> None:
    """The plan that fits, its peak by term, and the preferred plans over a limit."""
    plan = choice.fits
    deadline = "" if deadline_s is None else f" of {deadline_s:g} s"
    Console().print(
        f"{escape(plan.summary)}: [bold]{format_size(plan.needed_bytes)}[/] of a budget of "
        f"{format_size(budget_bytes)}, about [bold]{plan.step_seconds:.3g} s[/]{deadline} a step on this machine",
        highlight=False,
    )
    if choice.server:
        Console().print(escape(choice.server), highlight=False, soft_wrap=True)
    _show_terms(plan.terms | ({"server": plan.serving_bytes} if plan.serving_bytes else {}), budget_bytes)
    preferred = [*choice.rejected]
    # The next better plan of the same model comes last, unless it is the smallest of its format.
    if choice.better and choice.better not in preferred:
        preferred.append(choice.better)
    slow = ""
    rows = []
    for plan in preferred:
        peak, over_s = plan.needed_bytes, over_deadline_s(plan, deadline_s)
        excess = [format_size(peak - budget_bytes)] if peak > budget_bytes else []
        if over_s:
            excess.append(f"{over_s:.3g} s")
            slow = " or too slow"
        name = f"{Path(plan.source).name}, {plan.depth} layers, {plan.weights}"
        rows.append((name, plan.how, format_size(peak), f"{plan.step_seconds:.3g} s", " and ".join(excess)))
    if rows:
        _show(f"preferred, but too large{slow}", ("model", "at", "needs", "a step", "over by"), rows)


def show_status(status: "Status") -> None:
    """A fleet's round and its devices."""
    fleet = status.round.fleet
    finished = status.round.state == "finished"
    state = "finished" if finished else f"round {status.round.round} of {fleet.rounds} is open"
    Console().print(
        f"fleet [bold]{escape(status.fleet)}[/], method {fleet.method.name}: {state}", highlight=False
    )
    columns = ("device", "is", "round", "model", "peak / budget", "up / down", "held-out loss (exact)")
    _show("", columns, map(_status_cells, status.devices))


def _status_cells(device: "DeviceStatus") -> tuple[str, ...]:
    report = device.report
    if report is None:
        return device.id, device.presence
    plan, result = report.plan, report.result
    peak = f"{result.measured_peak_bytes / MIB:.0f} MiB" if result else "-"
    scores = result.evaluation.items() if result else ()
    empty = f", {result.empty} rows teach nothing" if result and result.empty else ""
    return (
        device.id,
        device.presence,
        f"{report.round}, {report.state}{empty}",
        f"{plan.depth} layers, {plan.weights}" if plan else "-",
        f"{peak} / {report.budget_bytes / MIB:.0f} MiB",
        f"{format_size(report.bytes_up)} / {format_size(report.bytes_down)}",
        failure(report)
        or ", ".join(f"{name} {_loss(score.loss)} ({score.accuracy:.0%})" for name, score in scores),
    )


def show_demo(outcome: "DemoOutcome") -> None:
    """The demo's tables: memory and bytes, then what was learned."""
    _show(
        f"{outcome.rounds_closed} of {outcome.rounds} rounds with {outcome.method} in {outcome.seconds:.0f} s; "
        f"base model {outcome.devices[0].model.partition('@')[0]}",
        ("device", "model", "predicted / measured / budget", "sent", "received"),
        [
            (
                device.id,
                f"{device.depth} layers, {device.weights}",
                f"{device.predicted_peak_bytes / MIB:.0f} / {device.measured_peak_bytes / MIB:.0f} / "
                f"{device.budget_bytes / MIB:.0f} MiB",
                format_size(device.bytes_up),
                format_size(device.bytes_down),
            )
            for device in outcome.devices
        ],
    )
    _show(
        "held-out rows: loss and exact matches, before -> after",
        ("device", "own loss", "own exact", "others' loss", "others' exact"),
        [
            (
                device.id,
                f"{_loss(device.loss_before, 2)} -> {_loss(device.loss_after)}",
                f"{device.accuracy_before:.0%} -> {device.accuracy_after:.0%}",
                f"{_loss(device.others_loss_before, 2)} -> {_loss(device.others_loss_after)}",
                f"{device.others_accuracy_before:.0%} -> {device.others_accuracy_after:.0%}",
            )
            for device in outcome.devices
        ],
    )


def show_labels(labels: dict[str, float]) -> None:
    """A text's labels, the likeliest first."""
    _show("", ("label", "probability"), [(label, f"{p:.1%}") for label, p in labels.items()])


def _show_terms(terms: dict[str, int], scale_bytes: int) -> None:
    cell = "#" if Console().options.ascii_only else "█"
    rows = [
        (term, format_size(size), cell * round(BAR * size / scale_bytes))
        for term, size in sorted(terms.items(), key=lambda item: -item[1])
    ]
    _show("predicted peak", ("term", "size", ""), rows)


def _show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table of plain text: brackets in a device's words are no markup."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # a long name goes on in the next line
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _loss(value: float | None, places: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{places}f}"


def _title(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: object) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    return "-" if value is None else str(value)
