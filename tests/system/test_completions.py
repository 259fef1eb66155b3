"""Devices of different models and tokenizers learn from how others complete public prompts."""

import json
import shutil
from pathlib import Path

import pytest
from fleet import Fleet
from records import reports, sent

from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.completion import Completion

TABLES = """
[public]
file = "public.jsonl"
texts = 12

[codistill]
rows = 8
tokens = 8
"""
WORDS = {"r": "R", "g": "G", "b": "B"}


@pytest.fixture(scope="session")
def two_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one name, of other widths, depths and tokenizers: the second's has its bytes
    numbered the other way round. Their weights are large enough that they can be sure of
    something."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = []
    for number, (hidden, layers) in enumerate(((32, 4), (48, 3))):
        folder = tmp_path_factory.mktemp("one-of-two") / tiny_model.name
        shutil.copytree(tiny_model, folder)
        torch.manual_seed(number)
        config = LlamaConfig.from_pretrained(
            tiny_model, hidden_size=hidden, num_hidden_layers=layers, initializer_range=0.3
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        folders.append(folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    written["model"]["vocab"] = {
        token: 0 if token == "</s>" else 257 - number for token, number in vocabulary.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return folders[0], folders[1]


def rows(path: Path, letters: str, numbers: range, **more: str) -> Path:
    lines = [
        {"prompt": f"{letter * 3} {n}:", "completion": more.get("completion", WORDS[letter])}
        for n in numbers
        for letter in letters
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def published(fleet: Fleet, round_: int) -> dict[str, dict[int, Completion]]:
    """What the node published after a round, by file."""
    encoded = (fleet.folder / "node" / "versions").glob(f"{round_:05d}-*.edc")
    return {
        path.name: {answer.prompt: answer for answer in completion.decode(codec.answers(path.read_bytes()))}
        for path in encoded
    }


def test_completions_reach_a_model_of_another_tokenizer(fleet: Fleet, two_models: tuple[Path, Path]) -> None:
    narrow, wide = two_models
    fleet.write((narrow.name, 3), method="local", rounds=3, quorum=2, steps=40)
    file = fleet.folder / "fleet.toml"
    file.write_text(file.read_text() + TABLES)
    rows(fleet.folder / "public.jsonl", "rgb", range(20, 24), completion="not to be seen")
    held_out = rows(fleet.folder / "all.jsonl", "rgb", range(12, 20))
    node = fleet.node("--until-finished")
    fleet.rows = rows(fleet.folder / "a.jsonl", "rg", range(12))
    first = fleet.agent("a", "--until-finished", "--models", str(narrow.parent), "--eval", f"all={held_out}")
    fleet.rows = rows(fleet.folder / "b.jsonl", "gb", range(12))
    second = fleet.agent("b", "--until-finished", "--models", str(wide.parent), "--eval", f"all={held_out}")
    assert (node.end(), first.end(), second.end()) == (0, 0, 0)

    assert (
        sent(fleet, "a", 3) == {}
    )  # nothing but completions leaves with `local`, and of the last round none
    told = list(published(fleet, 2).values())
    assert len(told) == 3 and all(part == told[0] for part in told)  # two classes, and whichever comes late
    assert {"R", "G", "B"} <= {
        completion.text for completion in told[0].values()
    }  # R of the one model, B of the other
    assert all(0 <= prompt < 12 and 0 < completion.confidence <= 1 for prompt, completion in told[0].items())
    for device in "ab":
        before, after = (
            reports(fleet, state)[device, round_].result
            for state, round_ in (("trained", 1), ("finished", 3))
        )
        assert before is not None and after is not None
        assert after.evaluation["held_out_1"].accuracy > before.evaluation["held_out_1"].accuracy
    assert "not to be seen" not in (fleet.folder / "node" / "texts.jsonl").read_text()
