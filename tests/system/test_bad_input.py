"""What a user gets wrong ends in one sentence and the documented exit code."""

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from fleet import Command, Fleet

NOBODY = "mqtt://127.0.0.1:9"


def assert_one_sentence(command: Command, code: int, *words: str) -> None:
    assert command.end() == code
    error = command.error()
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error


@pytest.mark.parametrize("name", ["agent", "aggregator", "status"])
def test_no_broker_there(fleet: Fleet, name: str) -> None:
    fleet.write()
    fleet.broker = type("Nowhere", (), {"url": NOBODY})()  # type: ignore[assignment]
    started = {
        "agent": lambda: fleet.agent("a"),
        "aggregator": fleet.node,
        "status": lambda: Command("status", "--broker", NOBODY, "--fleet", "x"),
    }[name]()
    assert_one_sentence(started, 3, "no MQTT broker answered", "127.0.0.1:9")


@pytest.mark.parametrize(("folder", "file"), [("a", "agent.db"), ("node", "node.db")])
def test_the_state_of_another_version_is_refused_and_stays_as_it_is(
    fleet: Fleet, folder: str, file: str
) -> None:
    """The versions before there was a number of the format have 0."""
    fleet.write()
    path = fleet.folder / folder / file
    path.parent.mkdir()
    held_out = path.parent / "work" / "own.jsonl"
    held_out.parent.mkdir()
    held_out.write_text("of that version")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
        database.execute("INSERT INTO state VALUES ('residual', '3')")
    started = fleet.agent("a") if folder == "a" else fleet.node()
    assert_one_sentence(started, 2, f"{path.parent} was written by a version", "format 0", "another --state")
    assert held_out.read_text() == "of that version"
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT * FROM state").fetchall() == [("residual", "3")]
        assert database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [
            ("state",)
        ]


def test_a_wrong_fleet_name_is_answered_with_those_that_are_there(fleet: Fleet) -> None:
    fleet.write()
    fleet.node().phase("collecting")
    right, fleet.name = fleet.name, "no-such-fleet"
    assert_one_sentence(fleet.agent("a", "--wait", "1"), 3, "no-such-fleet", right)
    status = Command("status", "--broker", fleet.broker.url, "--fleet", "no-such-fleet")
    assert_one_sentence(status, 3, "no-such-fleet", right)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot read the data file"]),
        ("", ["has no rows"]),
        ('{"prompt": "a", "completion": "b"}\nnot json\n', ["line 2", "not a JSON object"]),
        ('{"prompt": "a"}\n', ["line 1", "prompt and completion"]),
    ],
)
def test_data_is_refused_before_anything_is_sent(fleet: Fleet, content: str | None, words: list[str]) -> None:
    fleet.broker = type("Nowhere", (), {"url": NOBODY})()  # type: ignore[assignment]  # it must not get this far
    fleet.rows.unlink()
    if content is not None:
        fleet.rows.write_text(content)
    assert_one_sentence(fleet.agent("a"), 2, *words)


def test_a_budget_too_small_names_the_smallest_that_fits(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4), (str(tiny_model), 2))
    node = fleet.node()
    node.phase("collecting")
    assert_one_sentence(
        fleet.agent("a", "--budget", "20MiB"), 4, "20 MiB is too small", "2 layers", "which needs"
    )
    assert "a: budget: " in node.phase("failed")["text"]


def test_a_model_that_cannot_be_read_is_named(fleet: Fleet, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    fleet.write((str(broken), 1))
    node = fleet.node()
    node.phase("collecting")
    assert_one_sentence(fleet.agent("a"), 2, "broken.gguf", "cannot be read")
    assert "a: model: " in node.phase("failed")["text"]


def test_a_wrong_key_of_the_fleet_file_names_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[fleet]\nname = "x"\nquorun = 2\n[[catalog]]\nsource = "m"\n')
    assert_one_sentence(Command("plan", "--fleet", str(path)), 2, "quorun", "did you mean `quorum`")


def test_an_unknown_board_and_a_bad_size_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[fleet]\nname = "x"\n[[catalog]]\nsource = "m"\n')
    board = Command("plan", "--fleet", str(path), "--board", "jetson-orin-nan-8gb")
    assert_one_sentence(board, 2, "jetson-orin-nano-8gb")
    assert_one_sentence(Command("plan", "--fleet", str(path), "--budget", "lots"), 2, "lots")


def test_a_deadline_is_not_promised_for_a_board_that_was_never_measured(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[fleet]\nname = "x"\n[training]\nstep_deadline_s = 2\n[[catalog]]\nsource = "m"\n')
    plan = Command("plan", "--fleet", str(path), "--board", "jetson-orin-nano-8gb")
    assert_one_sentence(plan, 2, "step_deadline_s", "a board one does not have", "leave the key out")


def test_plan_and_profile_speak_json(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4))
    fleet_file = str(fleet.folder / "fleet.toml")
    plan = Command(
        "plan", "--fleet", fleet_file, "--board", "jetson-orin-nano-8gb", "--json", cache=fleet.cache
    )
    planned = plan.until(lambda _: True)
    assert planned["plan"]["depth"] == 4
    assert (
        planned["predicted_peak_bytes"] == sum(planned["plan"]["terms"].values()) <= planned["budget_bytes"]
    )
    profile = Command("profile", "--json", cache=fleet.cache).until(lambda _: True)
    assert profile["ram_total_bytes"] > profile["runtime_baseline_bytes"] > 100 << 20


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--broker", "nope", ["mqtt://host:port"]),
        ("--broker", "mqtts://h?ca=/no-such.pem", ["no-such.pem"]),
        ("--id", "a b", ["--id", "'a b'"]),
        ("--fleet", "a/b", ["--fleet", "'a/b'"]),
    ],
)
def test_an_address_or_a_name_is_refused_before_a_state_is_made(
    tmp_path: Path, option: str, value: str, words: list[str]
) -> None:
    options = {
        "--fleet": "x",
        "--id": "a",
        "--data": "rows.jsonl",
        "--state": str(tmp_path / "state"),
        option: value,
    }
    assert_one_sentence(Command("agent", *(text for pair in options.items() for text in pair)), 2, *words)
    assert not (tmp_path / "state").exists()


def test_a_damaged_key_says_how_to_go_on(fleet: Fleet) -> None:
    fleet.write()
    fleet.broker = type("Nowhere", (), {"url": NOBODY})()  # type: ignore[assignment]
    (fleet.folder / "node").mkdir()
    (fleet.folder / "node" / "node.key").write_text("no hex\n")
    assert_one_sentence(
        fleet.node(), 2, "node.key as a signing key", "64 characters of hex", "put a backup of"
    )


def test_a_negative_number_of_threads_is_refused(fleet: Fleet) -> None:
    agent = fleet.agent("a", "--threads", "-5")
    assert agent.end() == 2
    assert "-5 is not in the range x>=0" in agent.error()


def test_ctrl_c_has_a_code_of_its_own(fleet: Fleet) -> None:
    fleet.write()
    node = fleet.node()
    node.phase("collecting")
    node.process.send_signal(signal.SIGINT)
    assert (node.end(), node.error()) == (130, "")
