"""Models for the tests: tiny random ones of every family, and the demo's real one, prepared once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large enough that every layer matters to the logits
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
PHI3_SIZES = {key: value for key, value in SIZES.items() if key != "head_dim"}


@pytest.fixture(scope="session")
def tiny():
    """tiny(family, **changes): a random float32 model of 4 layers, equal for equal arguments."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family, **changes):
        sizes = {"gpt2": GPT2_SIZES, "phi": PHI3_SIZES, "phi3": PHI3_SIZES}.get(family, SIZES)
        config = AutoConfig.for_model(family, **{**sizes, **changes})
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def facts_of():
    """facts_of(model, **where): what `prepare` writes down of a model."""
    from edge_runtime.models import facts
    from edge_runtime.models import families as roles

    def read(model, **where):
        block = roles.blocks(model)[0]
        linears = {
            role: roles.widths(block.get_submodule(path)) for role, path in roles.linears(block).items()
        }
        return facts.read(
            model.config, linears, **{"model_class": "tiny", "folder": "", "weights": "", **where}
        )

    return read


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The cache of every process that a test of this folder starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def demo_facts(cache):
    """Facts of the demo's model (SmolLM2-135M-Instruct), after it was prepared by a process of its own."""
    from edge_runtime.demo import model
    from edge_runtime.planning import processes

    return processes.prepared(str(model.path()), Path.cwd())


@pytest.fixture(scope="session")
def demo_tokenizer(demo_facts):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_facts.folder)


@pytest.fixture(scope="session")
def tiny_folder(tiny, demo_facts, tmp_path_factory):
    """A tiny random Llama in Hugging Face's layout, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama", vocab_size=demo_facts.vocabulary, initializer_range=0.05).save_pretrained(folder)
    for file in Path(demo_facts.folder).glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_facts(tiny_folder, cache):
    from edge_runtime.models.prepare import prepare

    return prepare(str(tiny_folder), tiny_folder.parent, cache / "models")


@pytest.fixture
def trained(tiny_facts, tmp_path):
    """trained(name, rows, held_out, **changes): one job in a trainer process of its own; its folder and result."""
    import msgspec
    from jobs import job_of

    from edge_runtime import settings
    from edge_runtime.planning import processes
    from edge_runtime.protocol.plan import Plan
    from edge_runtime.protocol.report import Result
    from edge_runtime.trainer import data

    def run(name, rows, held_out, **changes):
        folder = tmp_path / name
        folder.mkdir()
        plan = Plan(
            "m", tiny_facts.model_class, 4, tiny_facts.layers, "float32", 2, 8, 32, terms={}, step_seconds=0.0
        )
        values = {
            "train": True,
            "facts": tiny_facts,
            "plan": plan,
            "adapter": settings.Adapter(rank=2),
            "training": settings.Training(steps=12, rows_a_step=8, learning_rate=2e-2, max_tokens=32),
            "method": settings.Method("fedit"),
            "seed": 5,
            "round": 1,
            "rounds": 2,
            "data": str(data.write_rows(folder / "rows.jsonl", rows)),
            "evaluation": {"all": str(data.write_rows(folder / "all.jsonl", held_out))},
            "depths": (4,),
            "threads": 1,
        }
        (folder / "job.json").write_bytes(msgspec.json.encode(job_of(**{**values, **changes})))
        command = [sys.executable, "-m", "edge_runtime.trainer", str(folder)]
        ended = subprocess.run(command, env=processes.environment(), capture_output=True, timeout=1000)
        assert ended.returncode == 0, ended.stderr.decode()
        return folder, msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)

    return run
