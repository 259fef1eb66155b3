"""Nothing private leaves a device, whatever fails: rows, labels, paths, names of files, passwords,
the environment.

Each test plants a distinct secret in every such place, makes the device fail at one stage, and then
searches all that crossed the broker, all that node and status print and keep, and all that the
device itself prints.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import results
from crafted import crafted
from fleet import Command, Fleet
from records import Recorder, node_files, recorded, reports

from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.completion import Completion
from edge_runtime.protocol.report import Report, Score

ROW_SECRETS = (
    "prompt",
    "completion",
    "label",
    "field",
    "held-out",
)  # never on the device's own screen either
HIDDEN_SECRETS = ("password", "environment")  # nor these
PATH_SECRETS = ("data-path", "held-out-path", "held-out-name", "state-path", "model-path")


def secret(name: str) -> str:
    """The text that is planted under this name."""
    return f"SECRET-{name}-7f3a"


@pytest.fixture
def private(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """The fleet with a secret in each place that is private to its device."""
    monkeypatch.setenv("EDGE_TEST_TOKEN", secret("environment"))
    url = fleet.broker.url.replace("mqtt://", f"mqtt://someone:{secret('password')}@")
    fleet.broker = SimpleNamespace(url=url)  # type: ignore[assignment]
    fleet.rows = tmp_path / secret("data-path") / "rows.jsonl"
    fleet.rows.parent.mkdir()
    rows: list[dict[str, str]] = [
        {"prompt": f"{secret('prompt')} {n}", "completion": secret("completion"), secret("field"): ""}
        for n in range(20)
    ]
    rows += [{"text": f"text {n}", "label": secret("label")} for n in range(20)]
    fleet.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out(fleet).write_text(json.dumps({"prompt": "a", "completion": secret("held-out")}) + "\n")
    return fleet


def held_out(fleet: Fleet) -> Path:
    return fleet.rows.parent / f"{secret('held-out-path')}.jsonl"


def start(fleet: Fleet, *more: str) -> Command:
    """The device with all that is private to it."""
    state = fleet.folder / secret("state-path")
    evaluation = f"{secret('held-out-name')}={held_out(fleet)}"
    models = fleet.folder / secret("model-path")
    return fleet.agent("a", "--state", str(state), "--eval", evaluation, "--models", str(models), *more)


def linked(fleet: Fleet, model: Path) -> str:
    """A catalog's source that is a link on the device to a private place."""
    folder = fleet.folder / secret("model-path")
    folder.mkdir()
    (folder / "target").mkdir()
    (folder / "target" / secret("model-path")).symlink_to(model)
    (folder / "base").symlink_to(folder / "target" / secret("model-path"))
    return "base"


def spoil(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text + "\n")


@pytest.fixture
def recorder(fleet: Fleet) -> Iterator[Recorder]:
    """All that crosses the broker from here on."""
    with recorded(fleet) as running:
        yield running


def assert_nothing_private(fleet: Fleet, recorder: Recorder, device: Command, *commands: Command) -> None:
    """Search what crossed, and what every process printed and the node keeps."""
    status = Command("status", "--broker", fleet.broker.url, "--fleet", fleet.name)
    assert status.end() == 0
    for command in commands:
        command.process.terminate()
        command.end()
    far = [recorder.searchable(), *map(printed, (status, *commands)), node_files(fleet)]
    assert len(recorder.messages) > 1
    names = (*ROW_SECRETS, *HIDDEN_SECRETS, *PATH_SECRETS)
    assert [name for name in names for text in far if secret(name) in text] == []
    near = printed(device)
    assert [name for name in (*ROW_SECRETS, *HIDDEN_SECRETS) if secret(name) in near] == []


def printed(command: Command) -> str:
    """All that an ended command wrote."""
    return command.output() + command.error()


def failed(fleet: Fleet) -> Report:
    (report,) = reports(fleet, "failed").values()
    return report


BROKEN: dict[str, Callable[[], str]] = {
    "value": lambda: json.dumps({"prompt": ["", secret("prompt")], "completion": "b"}),
    "field": lambda: json.dumps({secret("field"): secret("prompt")}),
    "long field": lambda: json.dumps({f"{secret('field')} and more": 1}),
    "no json": lambda: secret("prompt"),
    "role": lambda: json.dumps({"messages": [{"role": secret("prompt"), "content": "a"}]}),
    "surrogate": lambda: json.dumps({"prompt": f"{secret('prompt')} \ud83d", "completion": "b"}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_that_was_bad_from_the_start(private: Fleet, kind: str) -> None:
    """The device refuses it before it connects, and does not print it."""
    spoil(private.rows, BROKEN[kind]())
    device = start(private)
    assert device.end() == 2
    assert "line 41" in device.error()
    assert [name for name in (*ROW_SECRETS, *HIDDEN_SECRETS) if secret(name) in printed(device)] == []


@pytest.mark.parametrize(("spoilt", "kind"), [("data", "value"), ("held-out", "no json")])
def test_a_row_that_is_spoilt_while_the_device_waits(
    private: Fleet, recorder: Recorder, tiny_model: Path, spoilt: str, kind: str
) -> None:
    private.write((linked(private, tiny_model), 4))
    device = start(private)
    device.phase("connected")
    # whichever rows the first round draws
    (private.rows if spoilt == "data" else held_out(private)).write_text(f"{BROKEN[kind]()}\n" * 40)
    node = private.node()
    assert device.end() == 2
    node.phase("failed")
    assert_nothing_private(private, recorder, device, node)
    assert (failed(private).cause, failed(private).exit_code) == ("data", 2)


def test_a_broker_that_does_not_answer(private: Fleet) -> None:
    private.broker = SimpleNamespace(url=f"mqtt://someone:{secret('password')}@127.0.0.1:9")  # type: ignore[assignment]
    device = start(private)
    assert device.end() == 3
    assert [name for name in (*ROW_SECRETS, *HIDDEN_SECRETS) if secret(name) in printed(device)] == []


def test_a_round_without_a_fault(private: Fleet, recorder: Recorder, tiny_model: Path) -> None:
    private.write((linked(private, tiny_model), 4))
    node = private.node("--until-finished")
    device = start(private, "--until-finished")
    assert (device.end(), node.end()) == (0, 0)
    assert_nothing_private(private, recorder, device, node)
    (report,) = reports(private, "finished").values()
    assert report.result is not None and list(report.result.evaluation) == ["held_out_1"]


@pytest.mark.parametrize("model", ["missing", "damaged"])
def test_a_model_that_cannot_be_used(private: Fleet, recorder: Recorder, model: str) -> None:
    folder = private.folder / secret("model-path")
    folder.mkdir()
    if model == "damaged":
        (folder / secret("model-path")).write_bytes(b"GGUF" + bytes(100))
        (folder / "base.gguf").symlink_to(folder / secret("model-path"))
    private.write(("base.gguf", 4))
    node, device = private.node(), start(private)
    assert device.end() == 2
    node.phase("failed")
    assert_nothing_private(private, recorder, device, node)
    assert failed(private).cause == "model"


def test_a_budget_that_is_too_small(private: Fleet, recorder: Recorder, tiny_model: Path) -> None:
    private.write((linked(private, tiny_model), 4))
    node, device = private.node(), start(private, "--budget", "20MiB")
    assert device.end() == 4
    node.phase("failed")
    assert_nothing_private(private, recorder, device, node)
    assert failed(private).cause == "budget"


def test_a_trainer_that_is_killed_again_and_again(
    private: Fleet, recorder: Recorder, tiny_model: Path
) -> None:
    private.write((linked(private, tiny_model), 4))
    node, device = private.node(), start(private, "--until-finished")
    while device.until(lambda event: event["phase"] in ("load", "failed"))["phase"] == "load":
        for pid in device.children():
            os.kill(pid, signal.SIGKILL)
    device.end()
    node.phase("failed")
    assert_nothing_private(private, recorder, device, node)
    assert failed(private).cause in ("memory", "budget")


def test_a_trainer_that_takes_too_long(private: Fleet, recorder: Recorder, tiny_model: Path) -> None:
    private.write((linked(private, tiny_model), 4))
    path = private.folder / "fleet.toml"
    path.write_text(path.read_text().replace("[training]", "[training]\ntimeout_s = 0.01"))
    node, device = private.node(), start(private, "--until-finished")
    assert device.end() == 5
    node.phase("failed")
    assert_nothing_private(private, recorder, device, node)
    assert (failed(private).cause, failed(private).exit_code) == ("time", 124)


CRASH = """
import os, sys
if "--attended" in sys.orig_argv:
    os.write(2, b"Traceback\\nRuntimeError: {words}\\n")
    os._exit({code})
"""


@pytest.mark.parametrize(("code", "cause"), [(1, "trainer"), (7, "disk")])
def test_a_trainer_that_crashes_with_a_row_in_its_last_words(
    private: Fleet,
    recorder: Recorder,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    cause: str,
) -> None:
    words = secret(
        "state-path" if code == 7 else "prompt"
    )  # a sentence of ours may name the device's own path
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASH.format(words=words, code=code))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    private.write((linked(private, tiny_model), 4))
    node, device = private.node(), start(private, "--until-finished")
    assert device.end() == 5
    node.phase("failed")
    assert_nothing_private(private, recorder, device, node)
    assert (failed(private).cause, failed(private).exit_code) == (cause, code)


def test_the_search_finds_a_planted_secret(private: Fleet, recorder: Recorder) -> None:
    """Twin: a secret in a report, and one in the compressed payload of an update, are found."""
    private.write()
    node = private.node()
    node.phase("collecting")
    result = results.result({secret("held-out-name"): Score(1.0, 0.0, 1)})
    with crafted(private, "crafted") as device:
        device.report(state="trained", result=result)
        device.offer(codec.encode({}, completion.encode([Completion(0, secret("completion"), 1.0)])))
    crossed = recorder.searchable()
    assert secret("held-out-name") in crossed and secret("completion") in crossed
    with pytest.raises(AssertionError, match="completion"):
        assert_nothing_private(private, recorder, Command("--help"), node)
