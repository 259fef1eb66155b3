"""Each example runs as its page says, on the demo's real model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """An activated virtual environment, with a cache of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "EDGE_RUNTIME_CACHE": str(tmp_path_factory.mktemp("cache"))}


def run(name: str, environment: dict[str, str], *arguments: str) -> str:
    """What the example prints; its end is awaited, as everything it starts has limits of its own."""
    script = EXAMPLES / name / "run.sh"
    ended = subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_every_example_is_tested():
    assert {path.parent.name for path in EXAMPLES.glob("*/run.sh")} == {
        "fit-a-board",
        "two-devices",
        "compare-methods",
    }


@pytest.mark.long
def test_a_model_is_chosen_for_each_budget_and_for_a_board(environment):
    printed = run("fit-a-board", environment)
    assert printed.count("predicted peak") == 4
    assert "weights streamed" in printed  # the smallest budget
    assert "a budget of 4.8" in printed  # what the system leaves of a Jetson Orin Nano's memory


@pytest.mark.long
def test_two_devices_learn_together(environment, tmp_path):
    printed = run("two-devices", environment, str(tmp_path))
    assert "kitchen" in printed and "workshop" in printed and "finished" in printed
    for device in ("kitchen", "workshop"):
        assert (tmp_path / f"{device}-state" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.long
def test_methods_are_compared(environment, tmp_path):
    printed = run("compare-methods", environment, str(tmp_path))
    for arm in ("local", "fedit", "flexlora"):
        assert f"{arm}, seed 0" in printed
    assert (tmp_path / "study" / "README.md").exists()
