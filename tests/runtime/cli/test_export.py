"""`edge-runtime export` as it is typed."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from edge_runtime import settings
from edge_runtime.adapters import learned
from edge_runtime.adapters.export import check
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.cli.export import command
from edge_runtime.errors import InputError
from edge_runtime.methods import fedit


def run(*words):
    """What the command prints on both streams; raises as it does."""
    ended = CliRunner().invoke(command, [*map(str, words)])
    if ended.exception is not None:
        raise ended.exception
    return ended.stdout, ended.stderr


def test_a_state_folder_is_exported_without_its_agent(tiny_facts, tmp_path):
    spec, layers, draw = settings.Adapter(rank=2), tuple(range(tiny_facts.layers)), np.random.default_rng(0)
    shapes = adapter_shapes(tiny_facts, layers, spec.roles, 2, fedit.METHOD)
    state = {key: draw.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
    adapter = learned.fold(state, tiny_facts, layers, spec, fedit.METHOD, 7)
    learned.write(adapter, tmp_path / "state" / "adapter")
    out = tmp_path / "merged"
    printed, told = run("--state", tmp_path / "state", "--to", "merged", "--out", out)
    assert printed == f"{out}: version 7 on {tiny_facts.model_class}, 4 of 4 layers\n"
    assert told.splitlines() == [  # each before what takes long
        f"reading the model {tiny_facts.source}",
        f"writing {out}",
        "computing the trainer's logits",
        "opening the export in transformers, to compare its logits",
    ]
    prompts = check.prompts(tiny_facts.vocabulary)
    merged = check.logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), prompts)
    assert np.allclose(merged, check.trainer(adapter, prompts).adapted, atol=1e-4)
    with pytest.raises(InputError, match=r"--out is .*merged, which exists"):
        run("--state", tmp_path / "state", "--to", "merged", "--out", out)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give one of --state, --node and --adapter"),
        (("--state", "a", "--node", "b"), "give one of --state, --node and --adapter"),
        (("--state", "nowhere"), "nowhere has no adapter: its agent writes one when it begins to train"),
        (("--adapter", "nowhere"), "nowhere cannot be read as an adapter of Edge Runtime"),
        (
            ("--state", "a", "--version", 0),
            "--version chooses among a node's versions, but --node is not given",
        ),
        (
            ("--adapter", "a", "--class", "b", "--depth", 2),
            "--class, --depth chooses among a node's versions",
        ),
        (("--node", "nowhere"), "nowhere is no node's state: it has no node.db"),
    ],
)
def test_a_place_without_an_adapter_is_named(words, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        run(*words, "--to", "peft", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_depth_of_no_layer_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        run("--node", "nowhere", "--depth", 0, "--to", "peft", "--out", tmp_path / "out")
