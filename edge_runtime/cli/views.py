"""Tables that the commands show a person, and the values of `plan` as plain data for --json."""

from collections.abc import Callable
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
    from edge_runtime.protocol.status import Status

MIB = 1 << 20
BAR = 40  # characters of a bar that stands for the budget
PLAN_FIELDS = (  # of a plan that does not fit, in --json
    *("source", "depth", "weights", "tokens", "rank", "rows", "boundaries", "mlp_tokens", "streamed"),
    *("kept_blocks", "predicted_peak_bytes", "step_seconds"),
)


def show_profile(values: dict[str, Any]) -> None:
    """A device, one fact a line; bytes as sizes."""
    table = _table("this device", "fact", "value")
    for key, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name}: {_cell(name, part)}" for name, part in value.items())
        _add(table, _title(key), _cell(key, value))
    Console().print(table)


def show_measurement(measurement: "Measurement") -> None:
    """Predicted terms, measured memory of each phase, and peak and time beside PEFT's."""
    console, peft = Console(), measurement.peft
    _show_terms(console, measurement.terms, measurement.predicted_peak_bytes)
    phases = {name: msgspec.structs.asdict(phase) for name, phase in measurement.phases.items()}
    if peft:
        phases |= {f"PEFT: {name}": msgspec.structs.asdict(phase) for name, phase in peft.phases.items()}
    # Views of memory that this machine has no figure for, such as a GPU's, are left out.
    columns = [
        key for key in next(iter(phases.values())) if any(row[key] is not None for row in phases.values())
    ]
    table = _table("measured", "phase", *map(_title, columns))
    for name, row in phases.items():
        _add(table, name, *(_cell(key, row[key]) for key in columns))
    console.print(table)
    table = _table("", "", "Edge Runtime", *(["PEFT", "ratio"] if peft else []))
    runs = [measurement, *([peft] if peft else [])]
    rows: list[tuple[str, list[float], Callable[[Any], str]]] = [
        ("peak", [run.measured_peak_bytes for run in runs], format_size),
        ("above the baseline", [run.measured_peak_bytes - run.baseline_bytes for run in runs], format_size),
        ("seconds a step", [run.step_seconds for run in runs], "{:.2f}".format),
    ]
    for name, values, text in rows:
        _add(table, name, *map(text, values), *([f"{values[0] / values[1]:.2f}"] if peft else []))
    console.print(table)
    console.print(
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
            "over_budget_bytes": max(0, plan.predicted_peak_bytes - budget_bytes),
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
    console, plan = Console(), choice.fits
    deadline = "" if deadline_s is None else f" of {deadline_s:g} s"
    console.print(
        f"{escape(plan.summary)}: [bold]{format_size(plan.predicted_peak_bytes)}[/] of a budget of "
        f"{format_size(budget_bytes)}, about [bold]{plan.step_seconds:.3g} s[/]{deadline} a step on this machine",
        highlight=False,
    )
    _show_terms(console, plan.terms, budget_bytes)
    preferred = [*choice.rejected]
    # The next better plan of the same model comes last, unless it is the smallest of its format.
    if choice.better and choice.better not in preferred:
        preferred.append(choice.better)
    if not preferred:
        return
    slow = " or too slow" if any(over_deadline_s(plan, deadline_s) for plan in preferred) else ""
    table = _table(f"preferred, but too large{slow}", "model", "at", "needs", "a step", "over by")
    for plan in preferred:
        peak, over_s = plan.predicted_peak_bytes, over_deadline_s(plan, deadline_s)
        excess = [format_size(peak - budget_bytes)] if peak > budget_bytes else []
        excess += [f"{over_s:.3g} s"] if over_s else []
        name = f"{Path(plan.source).name}, {plan.depth} layers, {plan.weights}"
        _add(table, name, plan.how, format_size(peak), f"{plan.step_seconds:.3g} s", " and ".join(excess))
    console.print(table)


def _show_terms(console: Console, terms: dict[str, int], scale_bytes: int) -> None:
    table = _table("predicted peak", "term", "size", "")
    for term, size in sorted(terms.items(), key=lambda item: -item[1]):
        _add(table, term, format_size(size), "█" * round(BAR * size / scale_bytes))
    console.print(table)


def show_status(status: "Status") -> None:
    """A fleet's round and its devices."""
    console, fleet = Console(), status.round.fleet
    state = (
        "finished"
        if status.round.state == "finished"
        else f"round {status.round.round} of {fleet.rounds} is open"
    )
    console.print(
        f"fleet [bold]{escape(status.fleet)}[/], method {fleet.method.name}: {state}", highlight=False
    )
    columns = ("device", "is", "round", "model", "peak / budget", "up / down", "held-out loss (exact)")
    table = _table("", *columns)
    for device in status.devices:
        report = device.report
        if report is None:
            _add(table, device.id, device.presence)
            continue
        result = report.result
        peak = f"{_mib(result.measured_peak_bytes) if result else '-'} / {_mib(report.budget_bytes)}"
        scores = result.evaluation.items() if result else ()
        _add(
            table,
            device.id,
            device.presence,
            f"{report.round}, {report.state}",
            f"{report.plan.depth} layers, {report.plan.weights}" if report.plan else "-",
            peak,
            f"{format_size(report.bytes_up)} / {format_size(report.bytes_down)}",
            failure(report)
            or ", ".join(f"{name} {_loss(score.loss)} ({score.accuracy:.0%})" for name, score in scores),
        )
    console.print(table)


def show_demo(outcome: "DemoOutcome") -> None:
    """The demo's tables: memory and bytes, then what was learned."""
    console = Console()
    memory = _table(
        f"{outcome.rounds_closed} of {outcome.rounds} rounds with {outcome.method} in {outcome.seconds:.0f} s; "
        f"base model {outcome.devices[0].model.partition('@')[0]}",
        *("device", "model", "predicted / measured / budget", "sent", "received"),
    )
    learned = _table(
        "held-out rows: loss and exact matches, before -> after",
        *("device", "own loss", "own exact", "others' loss", "others' exact"),
    )
    for device in outcome.devices:
        _add(
            memory,
            device.id,
            f"{device.depth} layers, {device.weights}",
            " / ".join(
                f"{size / MIB:.0f}"
                for size in (device.predicted_peak_bytes, device.measured_peak_bytes, device.budget_bytes)
            )
            + " MiB",
            format_size(device.bytes_up),
            format_size(device.bytes_down),
        )
        _add(
            learned,
            device.id,
            f"{_loss(device.loss_before, 2)} -> {_loss(device.loss_after)}",
            f"{device.accuracy_before:.0%} -> {device.accuracy_after:.0%}",
            f"{_loss(device.others_loss_before, 2)} -> {_loss(device.others_loss_after)}",
            f"{device.others_accuracy_before:.0%} -> {device.others_accuracy_after:.0%}",
        )
    console.print(memory)
    console.print(learned)


def _loss(value: float | None, places: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{places}f}"


def _add(table: Table, *cells: str) -> None:
    """Add a row of plain text: brackets in a device's words are no markup."""
    table.add_row(*map(Text, cells))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


def _title(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: object) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    return "-" if value is None else str(value)
