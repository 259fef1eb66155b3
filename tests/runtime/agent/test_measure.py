"""`edge-runtime measure`: the real trainer and PEFT, each in its own process, on the same rows."""

import json
import os
import subprocess
import sys

import pytest

from edge_runtime.agent import measure as measuring
from edge_runtime.agent.measure import Measurement, Taken, texts
from edge_runtime.cli import views
from edge_runtime.errors import TrainerError
from edge_runtime.planning import processes
from edge_runtime.protocol.report import PhaseMemory
from edge_runtime.trainer.tokens import Tokenization

MIB = 1 << 20


def measure(folder, *more, environment=None):
    command = [sys.executable, "-m", "edge_runtime.cli", "measure", "--model", str(folder), "--json", *more]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1000, env={**os.environ, **(environment or {})}
    )


def test_rows_are_as_long_as_asked_for(demo_tokenizer):
    examples = Tokenization(demo_tokenizer, len(demo_tokenizer), 64).examples(texts(20, 64))
    assert {len(example.ids) for example in examples} == {64}


def test_both_train_the_same_and_say_what_they_took(tiny_folder, cache):
    command = measure(
        tiny_folder, "--batch", "2", "--tokens", "32", "--steps", "4", "--rank", "2", "--against", "peft"
    )
    assert command.returncode == 0, command.stderr
    printed = json.loads(command.stdout)
    assert set(printed["phases"]) == {"load", "evaluate", "train", "encode"} and set(
        printed["peft"]["phases"]
    ) == {
        "load",
        "train",
    }
    for taken in (printed, printed["peft"]):
        assert len(taken["losses"]) == 4 and taken["step_seconds"] > 0
        assert taken["measured_peak_bytes"] == max(phase["peak_bytes"] for phase in taken["phases"].values())
        assert taken["baseline_bytes"] > 200 * MIB
    assert printed["losses"][0] == pytest.approx(
        printed["peft"]["losses"][0], rel=0.01
    )  # both start from the base model
    assert printed["predicted_peak_bytes"] == sum(printed["terms"].values())
    assert 0 < printed["predicted_step_seconds"] < 1


def test_all_parameters_can_be_trained_beside_ours(tiny_facts, cache, tmp_path):
    fleet, plan = measuring.planned(tiny_facts, tiny_facts.layers, measuring.Trial("bfloat16", 2, 2, 32, 4))
    ours = measuring.taken(measuring.train(tiny_facts, fleet, plan, texts(8, 32), [], tmp_path))
    lora, full = measuring.beside(tmp_path), measuring.beside(tmp_path, "--full")
    assert ours.losses[0] == pytest.approx(full.losses[0], rel=0.01)
    assert full.losses[0] == pytest.approx(lora.losses[0], rel=1e-3)
    assert full.losses[-1] < lora.losses[-1]  # at the same rate they move much further


def test_the_table_has_the_views_that_are_there(capsys):
    taken = {
        "baseline_bytes": MIB,
        "measured_peak_bytes": 3 * MIB,
        "step_seconds": 1.0,
        "losses": [],
        "load_seconds": 1.0,
    }
    peft = Taken(**taken, phases={"load": PhaseMemory(4 * MIB, anonymous_bytes=7 * MIB)})
    phases = {"load": PhaseMemory(2 * MIB, driver_bytes=5 * MIB), "train": PhaseMemory(3 * MIB)}
    predicted = {
        "predicted_peak_bytes": 3 * MIB,
        "predicted_step_seconds": 2.0,
        "terms": {"weights": 3 * MIB},
    }
    command = Measurement(**taken, **predicted, phases=phases, peft=peft)
    views.show_measurement(command)
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert ["load", "2 MiB", "-", "5 MiB"] in cells and ["PEFT: load", "4 MiB", "7 MiB", "-"] in cells
    assert ["peak", "3 MiB", "3 MiB", "1.00"] in cells


def test_a_shape_without_weights_is_drawn_at_random_and_may_be_streamed(tiny_folder, cache, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    size = ("--batch", "1", "--tokens", "16", "--steps", "3", "--rank", "2", "--weights", "q4_1")
    taken = []
    for more in ((), ("--stream",)):
        command = measure(shape, "--random-weights", *size, *more)
        assert command.returncode == 0, command.stderr
        taken.append(json.loads(command.stdout))
    assert taken[0]["losses"] == taken[1]["losses"] and len(taken[0]["losses"]) == 3
    assert taken[1]["terms"]["weights"] < taken[0]["terms"]["weights"]
    refused = measure(shape, *size)
    assert refused.returncode == 2 and "has no .safetensors file" in refused.stderr
    refused = measure(tiny_folder, "--stream", "--tokens", "16")
    assert (
        refused.returncode == 2
        and "weights in bfloat16 cannot be streamed: use one of q8_0, q4_1" in refused.stderr
    )


def test_a_board_is_stood_for_by_a_larger_gpu_alone(tiny_folder, cache):
    for board, message in (
        ("rtx-3060-12g", "'rtx-3060-12g' is not known: did you mean rtx-3060-12gb"),
        ("raspberry-pi-5-8gb", "raspberry-pi-5-8gb has no GPU whose memory could be capped"),
        ("rtx-3060-12gb", "this machine has no GPU that could be capped to the memory of rtx-3060-12gb"),
    ):
        command = measure(tiny_folder, "--board", board, environment={"CUDA_VISIBLE_DEVICES": ""})
        assert command.returncode == 2 and message in command.stderr
        assert len(command.stderr.splitlines()) == 1
    command = measure(tiny_folder, "--device", "cuda", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert command.returncode == 2 and "--device is cuda, but no GPU was found" in command.stderr


def test_a_trainer_that_was_killed_is_said_to_be(tmp_path):
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(
        TrainerError, match="killed was killed, most likely because the machine ran out of memory"
    ):
        processes.output(["killed"], 60.0, TrainerError, {**os.environ, "PYTHONPATH": str(tmp_path)})


def test_a_process_that_does_not_end_is_a_sentence(tmp_path):
    (tmp_path / "endless.py").write_text("import threading\nthreading.Event().wait()\n")
    with pytest.raises(TrainerError, match="endless did not end within 1 s"):
        processes.output(["endless"], 1.0, TrainerError, {**os.environ, "PYTHONPATH": str(tmp_path)})


def test_what_cannot_be_measured_is_refused_in_a_sentence(tiny_folder, cache):
    for option in ("--steps", "--tokens"):
        command = measure(tiny_folder, option, "0")
        assert (command.returncode, command.stderr.strip()) == (
            2,
            f"edge-runtime: {option} is 0, but has to be 1 or more",
        )
    command = measure("-x")
    assert command.returncode == 2 and command.stderr.startswith(
        "edge-runtime: there is no model at -x, nor in "
    )
    command = measure(tiny_folder, "--rank", "300")
    assert (command.returncode, command.stderr.strip()) == (
        2,
        "edge-runtime: --rank is 300, but can be 256 at most",
    )
    command = measure(tiny_folder, "--tokens", "4096")
    message = f"edge-runtime: rows of 4096 tokens are too long: {tiny_folder} has 64 positions"
    assert (command.returncode, command.stderr.strip()) == (2, message)
