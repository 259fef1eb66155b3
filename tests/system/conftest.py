"""A broker for the session, a tiny model and the demo's real one, and a fleet a test."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_broker.local import Broker, start_broker
from fleet import Fleet

from edge_runtime.demo import model
from edge_runtime.planning import processes


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with start_broker(state_dir=tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="session")
def real_model(cache: Path) -> str:
    """The demo's GGUF file, prepared; at a depth of 2 a round of a few steps takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(cache))
        processes.prepared(str(model.path()), Path())
        processes.runtime_bytes()
        processes.rates("cpu", 1)  # the tests' agents train on one thread
    return str(model.path())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={"</s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reshaped(model: Path, folder: Path, **shape: int) -> Path:
    """A random model of another shape, with a model's name, folder layout and tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(model, folder / model.name)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(model, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / model.name)
    return folder / model.name


@pytest.fixture(scope="session")
def wider_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another width and depth."""
    return reshaped(tiny_model, tmp_path_factory.mktemp("wider"), hidden_size=48, num_hidden_layers=3)


@pytest.fixture(scope="session")
def widest_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a third width."""
    return reshaped(tiny_model, tmp_path_factory.mktemp("widest"), hidden_size=64, num_hidden_layers=3)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"say {n}: ", "completion": f"{n} {n}"}) + "\n" for n in range(40))
    )
    return path


@pytest.fixture
def fleet(
    broker: Broker, cache: Path, tmp_path: Path, rows: Path, request: pytest.FixtureRequest
) -> Iterator[Fleet]:
    name = f"system-{abs(hash(request.node.nodeid)) % 10**10}"
    started = Fleet(broker, cache, tmp_path, rows, name)
    yield started
    for command in started.running:
        command.kill()
