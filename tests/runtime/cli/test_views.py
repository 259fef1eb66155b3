"""What a person sees of what devices say."""

import io
import sys

import msgspec
import pytest
import results

from edge_runtime import settings
from edge_runtime.cli import views
from edge_runtime.planning.search import Choice
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Report, Score, failure
from edge_runtime.protocol.round import Round
from edge_runtime.protocol.status import DeviceStatus, Status


def test_what_a_device_says_is_shown_as_it_is(capsys, monkeypatch):
    """Brackets are no markup, and a loss that was not finite is said to be none."""
    monkeypatch.setenv("COLUMNS", "240")
    fleet = settings.Fleet("f", (settings.Model("m"),))
    failed = Report(device="[a]", node_key="", round=1, state="failed", budget_bytes=0, cause="memory")
    result = results.result({"[red]": Score(None, 0.0, 3)})
    result = msgspec.structs.replace(result, empty=7)
    trained = Report(device="b", node_key="", round=1, state="trained", budget_bytes=0, result=result)
    devices = [DeviceStatus(report.device, "online", report) for report in (failed, trained)]
    views.show_status(Status("f", Round(node="n", fleet=fleet, round=1, state="open", versions={}), devices))
    shown = capsys.readouterr().out
    assert "[a]" in shown and failure(failed) in shown and "[red] not finite (0%)" in shown
    assert "trained, 7 rows teach nothing" in shown


def test_a_name_longer_than_its_column_goes_on_in_the_next_line(capsys, monkeypatch):
    """A name that is cut short cannot be copied into another command."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-device-whose-name-is-longer-than-any-column-of-eighty-characters"
    fleet = settings.Fleet("f", (settings.Model("m"),))
    joined = Report(device=name, node_key="", round=1, state="joined", budget_bytes=0)
    current = Round(node="n", fleet=fleet, round=1, state="open", versions={})
    views.show_status(Status("f", current, [DeviceStatus(name, "online", joined)]))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "".join(line[2:].split("│")[0].split(" ")[0] for line in shown.splitlines() if "│" in line) == name


def plan_with_one_term():
    return Plan("m.gguf", "m@1", 2, 4, "q8_0", 4, 1, 32, terms={"runtime": 3 << 20}, step_seconds=1.0)


@pytest.mark.parametrize(
    ("encoding", "bar"), [("utf-8", "█" * 20), ("iso-8859-1", "#" * 20), ("ascii", "#" * 20)]
)
def test_a_bar_is_of_characters_that_the_terminal_has(encoding, bar, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    views.show_plan(Choice(plan_with_one_term(), [], None), 6 << 20, None)
    sys.stdout.flush()
    assert f" {bar} " in written.getvalue().decode(encoding)
