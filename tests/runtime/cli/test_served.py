"""generate and classify: what they print, and what they refuse by a sentence."""

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edge_runtime.adapters import learned
from edge_runtime.adapters.learned import Learned
from edge_runtime.cli import app, served
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models import weights
from edge_runtime.models.prepare import prepare
from edge_runtime.planning import processes
from edge_runtime.serving import backends
from edge_runtime.serving.answer import Question, answer
from edge_runtime.serving.text import Language
from edge_runtime.serving.torch_engine import TorchEngine

LABELS = ("no", "yes", "perhaps")


@pytest.fixture(scope="module")
def adapter(tiny_facts):
    """A random adapter of the tiny model, with a head."""
    random = np.random.default_rng(0)
    factors = {
        (layer, role): (
            random.normal(0, 0.3, (2, into)).astype(np.float32),
            random.normal(0, 0.3, (out, 2)).astype(np.float32),
        )
        for layer in range(tiny_facts.layers)
        for role, (out, into) in tiny_facts.linears.items()
    }
    head = random.normal(size=(len(LABELS), tiny_facts.hidden)).astype(np.float32)
    return Learned(tiny_facts, (0, 1, 2, 3), factors, 1, tiny_facts.source, LABELS, head)


@pytest.fixture(scope="module")
def folder(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned") / "adapter"
    learned.write(adapter, folder)
    return folder


def run(*arguments, typed=None):
    """What a command prints; an error of ours is raised."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"], typed)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def written(tiny_facts, adapter, asked, tokens):
    """The text of a greedy answer, by the engine itself."""
    engine, language = TorchEngine(tiny_facts, adapter, "float32"), Language(tiny_facts)
    ids, spaces = asked(language)
    pieces = answer(engine, language, Question(ids, tokens, spaces=spaces))
    return "".join(piece.text for piece in pieces)


@pytest.fixture
def generate(folder):
    """generate(*arguments): in float32, where nothing is rounded, with the model that the adapter names."""
    how = ("--weights", "float32", "--max-tokens", 6)
    return lambda *arguments, **typed: run("generate", "--adapter", folder, *how, *arguments, **typed)


def test_generate_goes_on_with_a_prompt_or_with_what_is_piped(generate, tiny_facts, adapter):
    truth = written(tiny_facts, adapter, lambda language: language.prompt("turn the oven"), 6)
    assert generate("--prompt", "turn the oven") == truth + "\n"
    assert generate(typed="turn the oven\n") == truth + "\n"
    base = ("--model", tiny_facts.weights, "--weights", "float32", "--max-tokens", 6)
    assert run("generate", *base, "--prompt", "turn the oven") != truth + "\n"


@pytest.mark.parametrize("more", [(), ("--chat",)])
def test_what_is_piped_in_another_encoding_is_refused(generate, more):
    with pytest.raises(InputError, match="the text is not UTF-8: unexpected end of data; give it as UTF-8"):
        generate(*more, typed="café".encode("latin-1"))


def test_a_chat_keeps_the_conversation(generate, tiny_folder, demo_facts, cache, adapter, tmp_path):
    with pytest.raises(InputError, match="the model has no chat template, so it cannot answer a chat"):
        generate("--chat", typed="hello\n")
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    shutil.copy(f"{demo_facts.folder}/chat_template.jinja", tmp_path / "tiny")
    facts = prepare(str(tmp_path / "tiny"), tmp_path, cache / "models")
    turns = [{"role": "user", "content": "hello"}]
    first = written(facts, adapter, lambda language: language.chat(turns), 6)
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    second = written(facts, adapter, lambda language: language.chat(turns), 6)
    assert (
        generate("--chat", "--model", tmp_path / "tiny", typed="hello\n\nagain\n") == f"{first}\n{second}\n"
    )
    assert second != written(facts, adapter, lambda language: language.chat(turns[2:]), 6)


def test_classify_shows_the_likeliest_label_first(folder, tiny_facts, adapter):
    text = "turn the oven on"
    model = weights.load(tiny_facts, 4, "float32")
    for (layer, role), (A, B) in adapter.factors.items():
        part = "self_attn" if role in "qkvo" else "mlp"
        matrix = model.get_submodule(f"model.layers.{layer}.{part}.{role}_proj").weight
        matrix += torch.from_numpy(B @ A)
    ids = torch.tensor([Language(tiny_facts).labelled(text)])
    state = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    p = (torch.from_numpy(adapter.head) @ torch.nn.functional.rms_norm(state, state.shape)).softmax(0)
    truth = dict(zip(LABELS, p.tolist(), strict=True))
    how = ("--adapter", folder, "--weights", "float32", "--text", text)
    seen = json.loads(run("classify", *how, "--json"))
    assert seen["text"] == text and seen["labels"] == pytest.approx(truth, abs=1e-4)
    assert list(seen["labels"]) == sorted(truth, key=lambda label: -truth[label])
    assert run("classify", *how).split().index(max(truth, key=lambda label: truth[label])) > 0


def test_only_what_computes_is_offered():
    helps = {name: run(name, "--help") for name in ("generate", "serve", "classify")}
    assert [name for name, text in helps.items() if "--backend" in text] == ["generate", "serve"]


def test_a_port_that_is_taken_is_told_before_the_model_is_looked_for(tmp_path):
    serve = ("serve", "--model", tmp_path / "nowhere", "--port")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1:{port}: .* in use; choose another"):
            run(*serve, port)
        # an agent is told too, and leaves nothing; its service tries again, so this is no wrong input
        fleet = ("--fleet", "f", "--id", "a", "--data", tmp_path / "rows", "--state", tmp_path / "state")
        with pytest.raises(EdgeError, match=f"--serve: cannot listen at 127.0.0.1:{port}: ") as refused:
            run("agent", *fleet, "--serve", port)
        assert refused.value.exit_code == 1 and not [*tmp_path.iterdir()]
    with pytest.raises(InputError, match=r"there is no model at .*nowhere"):
        run(*serve, port)


def test_packages_that_are_missing_are_told_with_their_extra_before_the_model_is_looked_for(
    tmp_path, monkeypatch
):
    model = ("--model", tmp_path / "nowhere")
    asked = {
        "uvicorn": ("serve", *model, "--port", 0),
        "onnxruntime": ("generate", *model, "--prompt", "x", "--backend", "onnx"),
    }
    for package, words in asked.items():
        with pytest.raises(InputError, match="there is no model at"):
            run(*words)
        with monkeypatch.context() as patch:
            patch.setattr(
                processes, "find_spec", lambda name, package=package: None if name == package else 1
            )
            with pytest.raises(InputError, match=r"the extra serve are not installed: .*'\.\[serve\]'"):
                run(*words)


def test_onnx_computes_on_the_cpu_also_where_there_is_a_gpu(monkeypatch):
    """The tests have none, and torch would take one."""
    profile = SimpleNamespace(gpu="any")
    monkeypatch.setattr(served.edge_profiles, "probe", lambda: profile)
    base = served.ServedBase(None, None, None, Path(), "float32", "auto", 1, "onnx")
    assert base.machine().device == "cpu" and base._replace(backend="torch").machine().device == "cuda"


def test_what_takes_long_is_told_beside_what_is_printed(tiny_facts, folder):
    words = ("generate", "--adapter", folder, "--prompt", "x", "--max-tokens", 2, "--device", "cpu")
    ended = CliRunner().invoke(app, [*map(str, words)])
    assert ended.stderr.splitlines() == [
        f"reading the model {tiny_facts.source}",
        f"loading {tiny_facts.model_class} in bfloat16 with torch",
    ]
    assert "tiny" not in ended.stdout


def test_an_answer_fits_the_positions_of_the_engine(tiny_facts, monkeypatch):
    """A graph may have fewer than its model."""
    monkeypatch.setattr(backends, "load", lambda *_: SimpleNamespace(positions=32))
    model = ("generate", "--model", tiny_facts.weights, "--prompt", "x y z")
    with pytest.raises(InputError, match="40 tokens leaves no room for a prompt in a context of 32"):
        run(*model, "--max-tokens", 40)
    with pytest.raises(InputError, match="the prompt has 3 tokens, but has to be 1 to 2, the context"):
        run(*model, "--max-tokens", 30)
    with pytest.raises(InputError, match="the prompt has 4000 characters, which cannot fit the 34 tokens"):
        run("generate", "--model", tiny_facts.weights, "--max-tokens", 30, "--prompt", "x y " * 1000)


def test_what_cannot_be_answered_with_is_told(folder, tiny_facts, adapter, tmp_path):
    prompt, model = ("--prompt", "x"), ("--model", tiny_facts.weights)
    # of a base that is not there: the head is asked for before the base
    headless = adapter._replace(head=None, labels=(), source=str(tmp_path / "nowhere"))
    learned.write(headless, tmp_path / "headless")
    for arguments, reason in (
        (("generate", *prompt), "there is nothing to answer with: give --model"),
        (("generate", "--adapter", folder, "--state", tmp_path, *prompt), "--adapter and --state both name"),
        (("generate", "--state", tmp_path, *prompt), "has no adapter yet"),
        (("generate", "--state", tmp_path / "nowhere", *prompt), "there is no folder .*nowhere"),
        (("serve", "--state", tmp_path, "--model", tmp_path / "nowhere"), "has no adapter yet"),
        (("generate", "--adapter", tmp_path, *prompt), "cannot be read as an adapter"),
        (("generate", "--adapter", tmp_path / "headless", *prompt), "there is no model at .*nowhere"),
        (("generate", *model, *prompt), "256 tokens leaves no room for a prompt in a context of 64"),
        (
            ("generate", *model, "--max-tokens", 60, "--prompt", "x y z u v w"),
            "has to be 1 to 4, the context",
        ),
        (("generate", *model, "--max-tokens", 60, "--prompt", ""), "the prompt has 0 tokens"),
        (("classify", "--model", tmp_path / "nowhere", "--text", "x"), "no label head was learned"),
        (("classify", "--adapter", tmp_path / "headless", "--text", "x"), "no label head was learned"),
        (("classify", "--adapter", folder, "--text", ""), "the text is empty, so it has no label"),
        (("classify", "--adapter", folder, "--text", "caf\udce9"), "the text is not UTF-8: surrogates"),
        (("generate", *model, "--prompt", "caf\udce9"), "the text is not UTF-8: surrogates"),
    ):
        with pytest.raises(InputError, match=reason):
            run(*arguments)
