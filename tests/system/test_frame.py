"""Devices of different models that share a core and a head in the common frame, over a real broker."""

import json
from pathlib import Path

import numpy as np
import pytest
from fleet import Fleet
from records import committed, job, reports, sent
from safetensors.numpy import load_file

from edge_runtime.methods import frames, heterotune

TABLES = """
[head]
shared = "fleet"

[public]
file = "public.jsonl"
texts = 60
"""
SETTINGS = 'name = "heterotune"\nrank = 4\nstages = 2'


def write(fleet: Fleet, model: Path, rounds: int, quorum: int = 2, steps: int = 40) -> None:
    """fleet.toml with its public texts."""
    fleet.write((model.name, 3), method="heterotune", rounds=rounds, quorum=quorum, steps=steps)
    file = fleet.folder / "fleet.toml"
    file.write_text(file.read_text().replace('name = "heterotune"', SETTINGS) + TABLES)
    texts = [{"text": f"{letter * 3} {n}"} for n in range(20, 40) for letter in "rgb"]
    (fleet.folder / "public.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


def rows(path: Path, *labels: str) -> Path:
    """A file of rows with these labels."""
    lines = [{"text": f"{label[0] * 3} {n}", "label": label} for n in range(12) for label in labels]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def masters(fleet: Fleet, round_: int) -> list[dict[str, np.ndarray]]:
    """The versions after a round: the fleet's, and one a model class."""
    paths = (fleet.folder / "node" / "versions").glob(f"{round_:05d}-*.safetensors")
    return sorted(map(load_file, paths), key=lambda state: frames.SENT in state)


def test_two_models_move_one_core_and_one_head(fleet: Fleet, tiny_model: Path, wider_model: Path) -> None:
    write(fleet, tiny_model, rounds=2)
    node = fleet.node("--until-finished")
    held_out = rows(fleet.folder / "all.jsonl", "red", "green", "blue")
    agents = []
    for device, model, labels in (("a", tiny_model, ("red", "green")), ("b", wider_model, ("green", "blue"))):
        fleet.rows = rows(fleet.folder / f"{device}.jsonl", *labels)
        where = ("--models", str(model.parent), "--eval", f"all={held_out}")
        agents.append(fleet.agent(device, "--until-finished", *where))
    assert (node.end(), *(agent.end() for agent in agents)) == (0, 0, 0)

    joined = {device: reports(fleet, "trained")[device, 1].result for device in "ab"}
    assert all(result is not None and not result.losses for result in joined.values())
    shared, *classes = masters(fleet, 2)
    assert {key.split(".")[0] for key in shared} == {"stages", "labels", "frame"}
    assert [sorted({key.split(".")[0] for key in state}) for state in classes] == 2 * [["frame", "layers"]]
    first, second = deltas = [sent(fleet, device, 2) for device in "ab"]
    cores = [key for key in shared if key.startswith("stages")]
    assert cores and all(key in delta and delta[key].any() for key in cores for delta in deltas)
    for key in cores:
        steps = np.stack([delta[key].ravel() for delta in deltas])
        truth = heterotune.combined(steps, np.array([0.5, 0.5]), "leave-one-out")
        np.testing.assert_allclose(shared[key].ravel(), truth, atol=1e-6)
    for label, truth in (
        ("red", first["labels.red.H"]),
        ("green", (first["labels.green.H"] + second["labels.green.H"]) / 2),
        ("blue", second["labels.blue.H"]),
    ):
        np.testing.assert_allclose(shared[f"labels.{label}.H"], truth, atol=1e-6)
    for device in "ab":
        maps = load_file(fleet.folder / device / "work" / "finished" / "frame.bin")
        assert maps[frames.MAP].any() and all(value.any() for value in maps.values())
        finished = reports(fleet, "finished")[device, 2].result
        assert finished is not None and finished.evaluation["held_out_1"].accuracy > 0.5


@pytest.mark.long
def test_a_class_joins_whoever_is_killed_and_a_third_one_later(
    fleet: Fleet, tiny_model: Path, wider_model: Path, widest_model: Path
) -> None:
    write(fleet, tiny_model, rounds=5, steps=10)
    models = {"a": tiny_model, "b": wider_model, "c": widest_model}

    def start(device: str):
        fleet.rows = rows(fleet.folder / f"{device}.jsonl", "red", "green", "blue")
        return fleet.agent(device, "--until-finished", "--models", str(models[device].parent))

    node, first = fleet.node("--until-finished"), start("a")
    first.phase("features")
    first.kill()
    first = start("a")
    node.phase("received")
    node.kill()  # with the features of one class in its journal
    node, second = fleet.node("--until-finished"), start("b")
    node.until(lambda event: event["phase"] == "collecting" and event["round"] == 3)
    third = start("c")
    third.phase("features", 240)
    assert (node.end(240), *(agent.end() for agent in (first, second, third))) == (0, 0, 0, 0)

    rounds = {(device, round_) for device, round_ in committed(fleet)}
    assert {(device, round_) for device in "ab" for round_ in range(1, 6)} < rounds
    joined = min(round_ for device, round_ in rounds if device == "c")
    assert joined in (3, 4)
    results = {
        (device, round_): report.result for (device, round_), report in reports(fleet, "trained").items()
    }
    for (device, round_), result in results.items():
        assert result is not None
        assert bool(result.losses) is (round_ > (joined if device == "c" else 1)), (device, round_)
    (before, *two), (after, *three) = masters(fleet, 2), masters(fleet, 5)
    assert (len(two), len(three)) == (2, 3)
    Z, turned = before[frames.MADE], after[frames.MADE]
    # the frame was made again of three classes, and turned to the one before
    leading = slice(20)
    cosine = (Z * turned)[:, leading].sum() / np.sqrt(
        (Z[:, leading] ** 2).sum() * (turned[:, leading] ** 2).sum()
    )
    assert not np.array_equal(Z, turned) and cosine > 0.5
    for device in "abc":
        assert job(fleet, device, 5)["carried"]["frame"] is not None
        maps = load_file(fleet.folder / device / "work" / "finished" / "frame.bin")
        np.testing.assert_allclose(maps[frames.MADE], turned, atol=0.02)  # as it travelled
