"""Devices of different models that learn from what the others predict, over a real broker."""

import contextlib
import json
from pathlib import Path

import numpy as np
from fleet import Fleet
from records import reports, sent
from safetensors.numpy import load_file

from edge_runtime import methods, settings
from edge_runtime.adapters import versions
from edge_runtime.aggregator.store import NodeStore
from edge_runtime.protocol import codec

TABLES = """
[head]

[public]
file = "public.jsonl"
texts = 12

[codistill]
rows = 4
"""


def rows(path: Path, *labels: str) -> Path:
    lines = [{"text": f"{label[0] * 3} {n}", "label": label} for n in range(12) for label in labels]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def published(fleet: Fleet) -> dict[str, dict[str, np.ndarray]]:
    """The node's last version of each class."""
    method = methods.of(settings.load(fleet.folder / "fleet.toml"))
    store = NodeStore(fleet.folder / "node" / "node.db")
    with contextlib.closing(store.connection):
        return {name: versions.published(last.chain, 0, method) for name, last in store.versions().items()}


def test_a_label_that_a_model_never_met_reaches_it_from_another(
    fleet: Fleet, tiny_model: Path, wider_model: Path
) -> None:
    fleet.write((tiny_model.name, 3), method="local", rounds=3, quorum=2, steps=40)
    file = fleet.folder / "fleet.toml"
    file.write_text(file.read_text() + TABLES)
    public = [
        {"text": f"{letter * 3} {n}", "label": "not to be seen"} for n in range(20, 24) for letter in "rgb"
    ]
    (fleet.folder / "public.jsonl").write_text("".join(json.dumps(line) + "\n" for line in public))
    held_out = rows(fleet.folder / "all.jsonl", "red", "green", "blue")
    node = fleet.node("--until-finished")
    fleet.rows = rows(fleet.folder / "a.jsonl", "red", "green")
    first = fleet.agent(
        "a", "--until-finished", "--models", str(tiny_model.parent), "--eval", f"all={held_out}"
    )
    fleet.rows = rows(fleet.folder / "b.jsonl", "green", "blue")
    second = fleet.agent(
        "b", "--until-finished", "--models", str(wider_model.parent), "--eval", f"all={held_out}"
    )
    assert (node.end(), first.end(), second.end()) == (0, 0, 0)
    assert node.error().count("the fleet has 3 labels and 12 public texts") == 1

    taught = {key: value for state in published(fleet).values() for key, value in state.items()}
    # nothing else crosses with `local`
    assert taught.keys() == {f"anchors.{label}.T" for label in ("red", "green", "blue")}
    assert all(value.shape == (1, 12) and value.any() for value in taught.values())
    assert sent(fleet, "a", 3) == {}  # nobody would learn from what is said in the last round
    for device, unmet in (("a", "blue"), ("b", "red")):
        state = load_file(fleet.folder / device / "work" / "round-3" / "state.bin")
        assert {key for key in state if key.startswith("labels")} == {
            f"labels.{label}.{'K' if label == unmet else 'H'}" for label in ("red", "green", "blue")
        }
        before, after = (
            reports(fleet, state)[device, round_].result
            for state, round_ in (("trained", 1), ("finished", 3))
        )
        assert before is not None and after is not None
        assert after.evaluation["held_out_1"].accuracy > before.evaluation["held_out_1"].accuracy
    assert "not to be seen" not in (fleet.folder / "node" / "texts.jsonl").read_text()


def test_a_class_that_comes_late_starts_from_what_the_fleet_shares(
    fleet: Fleet, tiny_model: Path, wider_model: Path
) -> None:
    fleet.write((tiny_model.name, 3), rounds=2, quorum=1, steps=30)
    file = fleet.folder / "fleet.toml"
    file.write_text(file.read_text() + TABLES)
    (fleet.folder / "public.jsonl").write_text(
        "".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(12))
    )
    fleet.rows = rows(fleet.folder / "a.jsonl", "red", "green")
    node = fleet.node("--until-finished")
    early = fleet.agent("early", "--until-finished", "--models", str(tiny_model.parent))
    node.until(lambda event: event["phase"] == "collecting" and event["round"] == 2)
    fleet.rows = rows(fleet.folder / "b.jsonl", "blue")
    late = fleet.agent("late", "--until-finished", "--models", str(wider_model.parent))
    starting = late.phase("starting")
    job = json.loads((fleet.folder / "late" / "work" / f"round-{starting['round']}" / "job.json").read_text())
    told = codec.shapes(Path(*job["start"]).read_bytes())
    assert told.keys() == {"anchors.red.T", "anchors.green.T"}  # no version of its own class is there yet
    assert (node.end(), early.end(), late.end()) == (0, 0, 0)


def test_a_fleet_whose_public_texts_are_too_few_is_not_announced(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4))
    file = fleet.folder / "fleet.toml"
    file.write_text(file.read_text() + TABLES)
    (fleet.folder / "public.jsonl").write_text('{"text": "one"}\n')
    node = fleet.node()
    assert node.end() == 2
    assert "texts is 12, but" in (error := node.error()) and "has 1 rows" in error
