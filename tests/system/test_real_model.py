"""Two devices with different depths of a real model, two rounds: what is merged and kept."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fleet import Fleet
from records import committed, job, master, remembered, reports, sent, version_0

from edge_runtime import settings
from edge_runtime.demo import outcome as demo
from edge_runtime.planning import processes
from edge_runtime.planning.candidates import candidates

FEW = 10  # rows of the shallow device; the deep one draws 16 a round out of its 40
DEEP, SHALLOW = "deep", "shallow"


@pytest.fixture(scope="module")
def ran(
    broker: object, cache: Path, real_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Fleet, dict[str, int]]]:
    """The fleet after both rounds, and its budgets; `kept` holds the work of round 1."""
    folder = tmp_path_factory.mktemp("ran")
    rows = [json.dumps({"prompt": f"say {n}: ", "completion": f"{n} {n}"}) + "\n" for n in range(60)]
    files = {"many": rows[:40], "few": rows[:FEW], "own": rows[40:50], "others": rows[50:]}
    for name, chosen in files.items():
        (folder / f"{name}.jsonl").write_text("".join(chosen))
    fleet = Fleet(broker, cache, folder, folder / "many.jsonl", "system-real-model")  # type: ignore[arg-type]
    fleet.write((real_model, 3), (real_model, 2), quorum=2, rounds=2, deadline_s=120)
    budgets = {DEEP: 4 << 30, SHALLOW: budget_of_depth(fleet, real_model, 2)}
    held_out = [f"--eval={name}={folder / name}.jsonl" for name in ("own", "others")]
    try:
        node = fleet.node("--until-finished")
        agents = {}
        for id, data in ((DEEP, "many"), (SHALLOW, "few")):
            fleet.rows = folder / f"{data}.jsonl"
            agents[id] = fleet.agent(id, "--until-finished", "--budget", str(budgets[id]), *held_out)
        node.until(lambda event: event["phase"] == "collecting" and event["round"] == 2)
        for id in budgets:  # a round's work is tidied away once the next one is settled
            shutil.copytree(folder / id / "work" / "round-1", folder / id / "kept" / "round-1")
        assert (node.end(), *(agent.end() for agent in agents.values())) == (0, 0, 0)
        yield fleet, budgets
    finally:
        for command in fleet.running:
            command.kill()


def budget_of_depth(fleet: Fleet, model: str, depth: int) -> int:
    """A budget that this depth fits and no larger one of the catalog does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(fleet.cache))
        facts = {model: processes.prepared(model, Path())}
        measured = processes.runtime_bytes(), processes.rates("cpu", 1)
        plans = list(candidates(settings.load(fleet.folder / "fleet.toml"), facts, *measured))
    return next(group[-1].predicted_peak_bytes for group in plans if group[-1].depth == depth)


def mean(fleet: Fleet, round_: int, work: str = "work") -> dict[str, np.ndarray]:
    """Mean of two deltas: weighted by samples where both hold a tensor, else the deeper one's."""
    deep, shallow = sent(fleet, DEEP, round_, work), sent(fleet, SHALLOW, round_, work)
    assert {key.split(".")[1] for key in deep} == {"0", "1", "29"}
    assert {key.split(".")[1] for key in shallow} == {"0", "29"}
    return {
        key: (16 * value + FEW * shallow[key]) / (16 + FEW) if key in shallow else value
        for key, value in deep.items()
    }


Ran = tuple[Fleet, dict[str, int]]


def test_the_first_version_is_the_initial_one_plus_the_weighted_mean(ran: Ran) -> None:
    merged, steps = master(ran[0], 1), mean(ran[0], 1, "kept")
    assert merged.keys() == steps.keys()
    for key, step in steps.items():
        np.testing.assert_allclose(merged[key], version_0(key, step.shape) + step, atol=1e-6, err_msg=key)


def test_the_second_version_adds_the_mean_of_its_round_to_the_first(ran: Ran) -> None:
    first, second = master(ran[0], 1), master(ran[0], 2)
    for key, step in mean(ran[0], 2).items():
        np.testing.assert_allclose(second[key], first[key] + step, atol=1e-6, err_msg=key)


def test_an_unweighted_mean_would_be_seen(ran: Ran) -> None:
    fleet, merged = ran[0], master(ran[0], 1)
    deep, shallow = sent(fleet, DEEP, 1, "kept"), sent(fleet, SHALLOW, 1, "kept")
    off = [
        np.abs(merged[key] - version_0(key, deep[key].shape) - (deep[key] + shallow[key]) / 2).max()
        for key in shallow
    ]
    assert max(off) > 1e-4


@pytest.mark.parametrize("device", [DEEP, SHALLOW])
def test_what_rounding_lost_is_owed_until_the_receipt_of_the_next_round(ran: Ran, device: str) -> None:
    fleet = ran[0]
    assert job(fleet, device, 2)["carried"]["residual"].endswith("round-1/residual.bin")
    assert remembered(fleet, device)["residual"] == "2"
    assert (fleet.folder / device / "work" / "round-2" / "residual.bin").exists()


def test_reports_say_what_was_planned_measured_and_moved(ran: Ran) -> None:
    fleet, budgets = ran
    trained, finished = reports(fleet, "trained"), reports(fleet, "finished")
    assert trained.keys() == {(device, round_) for device in budgets for round_ in (1, 2)}
    assert finished.keys() == {(device, 2) for device in budgets}
    for (device, _), report in trained.items():
        assert report.plan is not None and report.plan.depth == (3 if device == DEEP else 2)
        assert report.result is not None and report.result.samples == (16 if device == DEEP else FEW)
        assert report.result.payload_bytes < report.bytes_up < report.result.payload_bytes + 16_384


def test_the_demo_reads_its_outcome_from_such_a_fleet(ran: Ran) -> None:
    fleet, budgets = ran
    outcome = demo.read("fedit", 2, budgets, fleet.folder, 1.0)
    assert outcome.rounds_closed == outcome.rounds == 2
    assert [(device.id, device.depth) for device in outcome.devices] == [(DEEP, 3), (SHALLOW, 2)]
    every = [*reports(fleet, "trained").values(), *reports(fleet, "finished").values()]
    for device in outcome.devices:
        of_device = [report for report in every if report.device == device.id]
        assert device.measured_peak_bytes == max(
            report.result.measured_peak_bytes for report in of_device if report.result
        )
        assert device.bytes_up == sum(report.bytes_up for report in of_device)
        assert device.loss_after < device.loss_before
    assert not [fault for fault in outcome.faults if "round" in fault or "loss" in fault]


def test_the_demo_names_a_round_that_did_not_close(ran: Ran) -> None:
    fleet, budgets = ran
    assert "2 of 3 rounds closed" in demo.read("fedit", 3, budgets, fleet.folder, 1.0).faults


def test_a_trainer_that_is_killed_for_memory_is_followed_by_a_smaller_one_in_the_same_round(
    fleet: Fleet, real_model: str
) -> None:
    fleet.write((real_model, 12), (real_model, 3), steps=6)
    node = fleet.node("--until-finished")
    agent = fleet.agent("a", "--until-finished")
    for once in (", 12 blocks run once", ""):  # first without what only saves time
        first = agent.phase("starting")["text"]
        assert "12 of 30 layers" in first and first.endswith(f" 32 tokens{once}")
        agent.phase("train")
        for trainer in agent.children():
            os.kill(trainer, signal.SIGKILL)
        again = agent.phase("again")
        assert "exit code -9" in again["text"]
    smaller = agent.phase("starting")
    assert "3 of 30 layers" in smaller["text"] and smaller["round"] == again["round"] == 1
    assert (agent.end(), node.end()) == (0, 0)
    assert committed(fleet) == [("a", 1)]


def test_a_trainer_that_takes_more_than_its_budget_says_so_and_a_smaller_plan_finishes_the_round(
    fleet: Fleet, real_model: str, tmp_path: Path
) -> None:
    """The device believes that its libraries take nothing, so every plan needs more than predicted."""
    shutil.copytree(fleet.cache, tmp_path / "cache")
    baselines = (tmp_path / "cache").glob("baseline-*")
    (baseline,) = (path for path in baselines if not path.name.startswith("baseline-onnx"))
    real = int(baseline.read_text())
    baseline.write_text("1000000")
    fleet.cache = tmp_path / "cache"
    fleet.write((real_model, 20), (real_model, 3), steps=4)
    node = fleet.node("--until-finished")
    agent = fleet.agent("a", "--until-finished", "--budget", str(real + (320 << 20)))
    assert "20 of 30 layers" in agent.phase("starting")["text"]
    reason = agent.phase("again")["text"]
    assert "a step took" in reason and "of a budget of" in reason
    assert "3 of 30 layers" in agent.phase("starting")["text"]
    assert (agent.end(), node.end()) == (0, 0)
    assert committed(fleet) == [("a", 1)]
