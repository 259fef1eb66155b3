"""Commands as a person or a program calls them."""

import subprocess
import sys
from pathlib import Path

import pytest
from crafted import crafted
from fleet import Command, Fleet

OPTIONS = {
    "profile": ["--json"],
    "plan": ["--fleet", "--budget", "--board", "--models", "--device", "--json"],
    "broker": ["--port", "--state", "--kind"],
    "aggregator": ["--fleet", "--state", "--broker", "--credentials", "--node", "--until-finished", "--json"],
    "agent": [
        *(
            "--broker",
            "--credentials",
            "--fleet",
            "--id",
            "--data",
            "--state",
            "--budget",
            "--eval",
            "--models",
        ),
        *("--threads", "--device", "--wait", "--until-finished", "--json"),
    ],
    "status": ["--broker", "--credentials", "--fleet", "--forget", "--json"],
    "demo": ["--method", "--broker", "--credentials", "--keep", "--json"],
}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime.cli", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(command: str) -> None:
    process = run(command, "--help")
    assert process.returncode == 0
    shown = {
        word.strip(",")
        for line in process.stdout.splitlines()
        for word in line.split()[:2]
        if word.startswith("--")
    }
    assert shown >= set(OPTIONS[command])
    assert "--noop" not in process.stdout


def test_the_head_names_every_command() -> None:
    process = run("--help")
    assert process.returncode == 0
    assert all(command in process.stdout for command in OPTIONS)


def test_status_speaks_json_of_the_round_and_each_device(fleet: Fleet) -> None:
    fleet.write(rounds=2)
    fleet.noise_node().phase("collecting")
    with crafted(fleet, "here") as present:
        present.report(budget_bytes=7)
        status = Command("status", "--broker", fleet.broker.url, "--fleet", fleet.name, "--json").until(
            lambda _: True
        )
    assert status["fleet"] == fleet.name
    assert (status["round"]["state"], status["round"]["round"]) == ("open", 1)
    (device,) = status["devices"]
    assert (device["id"], device["presence"], device["report"]["budget_bytes"]) == ("here", "online", 7)


def test_a_device_that_will_not_come_back_is_forgotten(fleet: Fleet) -> None:
    fleet.write()
    node = fleet.noise_node()
    node.phase("collecting")
    for name in ("gone", "stays"):
        with crafted(fleet, name) as device:
            device.report()
        node.until(lambda event, name=name: event.get("text") == f"{name} is offline")
    where = ("status", "--broker", fleet.broker.url, "--fleet", fleet.name, "--json")
    for more in (["--forget", "gone"], []):
        status = Command(*where, *more).until(lambda _: True)
        assert [device["id"] for device in status["devices"]] == ["stays"]
    assert node.until(lambda event: event.get("text") == "gone is unknown")["missing"] == ["stays"]
    again = Command(*where, "--forget", "gone")
    assert again.end() == 2 and "has no device `gone` to forget; its devices: stays" in again.error()


def test_a_model_that_is_not_there_is_named_and_the_node_told(fleet: Fleet, tmp_path: Path) -> None:
    fleet.write((str(tmp_path / "nowhere.gguf"), 1))
    node = fleet.node()
    node.phase("collecting")
    agent = fleet.agent("a")
    assert agent.end() == 2
    error = agent.error()
    assert len(error.splitlines()) == 1 and "nowhere.gguf" in error
    assert "a: model: " in node.phase("failed")["text"]
