"""Models for the tests: tiny random ones of every family, and the demo's real one, prepared once."""

import shutil
from pathlib import Path

import pytest
from family_cases import CASES


@pytest.fixture(scope="session")
def tiny():
    """tiny(family, **changes): a random float32 model of 4 layers, equal for equal arguments.

    Its biases, which transformers begins with zeros, are random too.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family, **changes):
        config = AutoConfig.for_model(family, **{**CASES[family].sizes, **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                # as large as the logits that the head's is added to
                parameter.normal_(0, 1.0 if name == "lm_head.bias" else 0.02)
        return model

    return make


@pytest.fixture(scope="session")
def facts_of():
    """facts_of(model, **where): what `prepare` writes down of a model, also in its folder."""
    import msgspec

    from edge_runtime.models import facts, safetensors_index, structure

    def read(model, **where):
        if folder := where.get("weights"):
            index = safetensors_index.index(Path(folder), model.config, model)
            Path(folder, "tensors.json").write_bytes(msgspec.json.encode(index))
        blocks = structure.blocks(model)
        linears = structure.widths(blocks[0], structure.family(model))
        names = {"model_class": "tiny", "folder": "", "weights": "", **where}
        return facts.read(model.config, linears, structure.path(model, blocks), **names)

    return read


@pytest.fixture
def checkpoint(tiny, facts_of, tmp_path):
    """checkpoint(family, **changes): the facts of a tiny model that is saved in a folder."""

    def save(family, **changes):
        model = tiny(family, **changes)
        model.save_pretrained(tmp_path)
        return facts_of(model, folder=str(tmp_path), weights=str(tmp_path))

    return save


@pytest.fixture
def learn():
    """learn(facts, depth, version): a random adapter, large enough to change what is written."""

    def draw(facts, depth=None, version=1, scale=0.4):
        import numpy as np

        from edge_runtime.adapters.learned import Learned
        from edge_runtime.models.slices import kept_layers

        layers = kept_layers(depth or facts.layers, facts.layers)
        random = np.random.default_rng(version)
        factors = {
            (layer, role): (
                random.normal(0, scale, (3, into)).astype(np.float32),
                random.normal(0, scale, (out, 3)).astype(np.float32),
            )
            for layer in layers
            for role, (out, into) in facts.linears.items()
        }
        return Learned(facts, layers, factors, version, "/models/tiny")

    return draw


@pytest.fixture(scope="session")
def cache(cache):
    """The tests' cache, which the processes of these tests use without being told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(cache))
        yield cache


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


@pytest.fixture(scope="session")
def template():
    """Where trainer processes of tests are forked from, when their memory does not matter."""
    from template import Template

    started = Template()
    yield started
    started.close()


@pytest.fixture
def trained(tiny_facts, tmp_path, template):
    """trained(name, rows, held_out, **changes): one job in a trainer process of its own; its folder and result."""
    import msgspec
    from jobs import job_of

    from edge_runtime import settings
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
            "method": settings.MethodChoice("fedit"),
            "seed": 5,
            "round": 1,
            "rounds": 2,
            "data": str(data.write_rows(folder / "rows.jsonl", rows)),
            "evaluation": {"all": str(data.write_rows(folder / "all.jsonl", held_out))},
            "depths": (4,),
            "threads": 1,
        }
        (folder / "job.json").write_bytes(msgspec.json.encode(job_of(**{**values, **changes})))
        ended = template.run(folder)
        assert ended.returncode == 0, ended.stderr.decode()
        return folder, msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)

    return run
