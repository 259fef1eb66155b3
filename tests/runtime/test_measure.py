"""`edge-runtime measure`: the real trainer and PEFT, each in a process of its own, on the same rows."""

import json
import subprocess
import sys

import pytest

from edge_runtime.measure import texts
from edge_runtime.training import data

MIB = 1 << 20


def measure(folder, *more):
    command = [sys.executable, "-m", "edge_runtime.cli", "measure", "--model", str(folder), "--json"]
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=200)


def test_rows_are_as_long_as_asked_for(demo_tokenizer):
    examples = data.tokenize(texts(20, 64), demo_tokenizer, 64)
    assert {len(example.ids) for example in examples} == {64}


def test_both_train_the_same_and_say_what_they_took(tiny_folder, cache):
    done = measure(tiny_folder, "--batch", "2", "--tokens", "32", "--steps", "4", "--rank", "2", "--against", "peft")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen["phases"]) == {"load", "evaluate", "train", "encode"} and set(seen["peft"]["phases"]) == {
        "load",
        "train",
    }
    for taken in (seen, seen["peft"]):
        assert len(taken["losses"]) == 4 and taken["step_seconds"] > 0
        assert taken["measured_peak_bytes"] == max(taken["phases"].values())
        assert taken["baseline_bytes"] > 200 * MIB
    assert seen["losses"][0] == pytest.approx(seen["peft"]["losses"][0], rel=0.01)  # both start from the base model
    assert seen["predicted_peak_bytes"] == sum(seen["terms"].values())
    assert 0 < seen["predicted_step_seconds"] < 1


def test_a_shape_without_weights_is_drawn_at_random_and_may_be_streamed(tiny_folder, cache, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    size = ("--batch", "1", "--tokens", "16", "--steps", "3", "--rank", "2", "--weights", "q4_1")
    taken = []
    for more in ((), ("--stream",)):
        done = measure(shape, "--random-weights", *size, *more)
        assert done.returncode == 0, done.stderr
        taken.append(json.loads(done.stdout))
    assert taken[0]["losses"] == taken[1]["losses"] and len(taken[0]["losses"]) == 3
    assert taken[1]["terms"]["weights"] < taken[0]["terms"]["weights"]
    refused = measure(shape, *size)
    assert refused.returncode == 2 and "has no .safetensors file" in refused.stderr
    refused = measure(tiny_folder, "--stream", "--tokens", "16")
    assert refused.returncode == 2 and "weights in bfloat16 cannot be streamed: use one of q8_0, q4_1" in refused.stderr


def test_what_cannot_be_measured_is_refused_in_a_sentence(tiny_folder, cache):
    done = measure(tiny_folder, "--steps", "0")
    assert (done.returncode, done.stderr.strip()) == (2, "edge-runtime: --steps is 0, but has to be 1 or more")
    done = measure(tiny_folder, "--tokens", "4096")
    assert done.returncode == 2 and "max_tokens is 4096, but model has 64 positions" in done.stderr
