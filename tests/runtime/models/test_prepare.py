"""Sources are found, prepared once, or refused in one line."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import pytest

from edge_runtime.demo import model as demo
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.models.prepare import main, prepare
from edge_runtime.planning import processes


def test_the_facts_of_the_demos_model(demo_facts):
    assert (demo_facts.family, demo_facts.layers, demo_facts.hidden, demo_facts.intermediate) == (
        "llama",
        30,
        576,
        1536,
    )
    assert (demo_facts.heads, demo_facts.kv_heads, demo_facts.head_dim) == (9, 3, 64)
    assert (demo_facts.vocabulary, demo_facts.positions, demo_facts.tied_head) == (49152, 8192, True)
    assert demo_facts.linears["k"] == (192, 576) and demo_facts.linears["down"] == (576, 1536)
    assert demo_facts.weights == str(demo.path())
    assert demo_facts.block_parameters * 30 + demo_facts.head_parameters == pytest.approx(134.5e6, rel=0.001)


def test_a_prepared_folder_has_facts_tokenizer_and_weights(tiny_facts, tiny_folder):
    assert (tiny_facts.layers, tiny_facts.hidden, tiny_facts.head_dim) == (4, 32, 16)
    assert tiny_facts.model_class.startswith("tiny@")
    assert tiny_facts.weights == str(tiny_folder)
    assert tiny_facts.tokenizer_bytes == (Path(tiny_facts.folder) / "tokenizer.json").stat().st_size


def test_a_model_that_is_in_the_cache_is_found_without_torch(tiny_facts, tiny_folder, cache):
    script = "import sys; from edge_runtime.models import prepare; prepare.main(); sys.exit('torch' in sys.modules)"
    command = [
        sys.executable,
        "-c",
        script,
        str(tiny_folder),
        "--models",
        ".",
        "--cache",
        str(cache / "models"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=1000, env=processes.environment())
    assert found.returncode == 0 and msgspec.json.decode(found.stdout, type=Facts) == tiny_facts


def test_preparing_takes_no_more_memory_than_training(tmp_path):
    """In transformers' own way it was 622 MiB for SmolLM2, and 1,211 MiB for Gemma 3."""
    script = (
        "import re, sys; from edge_runtime.models import prepare; code = prepare.main(); "
        "sys.exit(code or re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", script, str(demo.path()), "--models", ".", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, env=processes.environment())
    assert 200 << 10 < int(done.stderr) < 480 << 10  # KiB; 416 MiB where it was measured


def test_a_prepared_folder_may_move(tiny_folder, tmp_path):
    before = prepare(str(tiny_folder), tmp_path, tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "other")
    after = prepare(str(tiny_folder), tmp_path, tmp_path / "other")
    assert after.folder == before.folder.replace("cache", "other") and Path(after.folder).is_dir()


def test_a_model_that_writes_no_text_is_refused(copied, tmp_path):
    (copied / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match=r"copied is a vit, which transformers cannot have write text"):
        prepare(str(copied), tmp_path, tmp_path / "cache")


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def with_code(folder, **stated):
    (folder / "theirs.py").write_text("raise SystemExit('their code ran')")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map, **stated}))


def test_a_known_type_is_read_with_transformers_code_and_none_of_the_folders(copied, tmp_path):
    with_code(copied)
    facts = prepare(str(copied), tmp_path, tmp_path / "cache")
    assert facts.family == "llama"
    assert "auto_map" not in (Path(facts.folder) / "config.json").read_text()


def test_a_type_that_only_the_folders_code_knows_is_refused(copied, tmp_path):
    with_code(copied, model_type="theirs")
    with pytest.raises(InputError, match=r"brings code of its own \(auto_map\)"):
        prepare(str(copied), tmp_path, tmp_path / "cache")


def test_an_unknown_architecture_is_refused_by_name(copied, tmp_path):
    from transformers import GPTNeoXConfig

    GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(copied)
    with pytest.raises(InputError, match="models of type gpt_neox are not supported; known: llama"):
        prepare(str(copied), tmp_path, tmp_path / "cache")


def with_keys(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "cannot be read: .*config.json' is not a valid JSON",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .safetensors file"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(copied, tmp_path, spoil, message):
    spoil(copied)
    with pytest.raises(InputError, match=message):
        prepare(str(copied), tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "relu"}, "cannot be made: .* has the activation relu, which is not known"),
        (
            {"rope_scaling": {"type": "nosuch", "factor": 2.0}},
            "sets rope_parameters.rope_type to nosuch, which transformers' llama leaves out",
        ),
    ],
)
def test_a_configuration_that_no_model_can_be_made_of_is_refused(copied, tmp_path, keys, message):
    with_keys(copied, **keys)
    with pytest.raises(InputError, match=message):
        prepare(str(copied), tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_hidden_layers", 2**31, r"its files have \d+ tensors"),
        ("num_hidden_layers", 0, "1 or more, is needed"),
        ("num_hidden_layers", -4, "1 or more, is needed"),
        ("num_hidden_layers", 4.0, "1 or more, is needed"),
        ("hidden_size", 2**40, r"the longest side of its tensors is \d+"),
        ("vocab_size", -1, "1 or more, is needed"),
        ("head_dim", 2**40, r"the longest side of its tensors is \d+"),
        ("head_dim", 0, "1 or more, is needed"),
        ("max_position_embeddings", 0, "1 or more, is needed"),
        ("text_config", {"num_hidden_layers": 2**31}, r"its files have \d+ tensors"),
    ],
)
def test_a_size_that_the_tensors_cannot_have_is_refused_before_a_model_is_made(
    copied, tmp_path, key, value, reason
):
    with_keys(copied, **{key: value})
    named, size = next(iter(value.items())) if isinstance(value, dict) else (key, value)
    with pytest.raises(InputError, match=rf"config.json in .*copied sets {named} to {size}, but .*{reason}"):
        prepare(str(copied), tmp_path, tmp_path / "cache")


def test_an_unknown_kind_of_model_is_named(copied, tmp_path):
    (copied / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(InputError, match=r"the model at .*copied cannot be read: .*`nosuch`"):
        prepare(str(copied), tmp_path, tmp_path / "cache")


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(copied, tmp_path):
    for file in copied.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"cannot be read: .*tokenizer .*[^:]$") as caught:
        prepare(str(copied), tmp_path, tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["models/nowhere", "no where/at all"])
def test_what_is_neither_here_nor_on_the_hub_is_refused_in_one_line(source, tmp_path, monkeypatch):
    hub, fetch = (import_module("huggingface_hub"), import_module("huggingface_hub").snapshot_download)

    def offline(repository, **more):
        if " " in repository:
            return fetch(repository, **more)
        raise hub.errors.LocalEntryNotFoundError("Got: no network\n\nPlease check your\nconnection.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError) as caught:
        prepare(source, tmp_path, tmp_path / "cache")
    said = str(caught.value)
    assert said.startswith(
        f"there is no model at {source}, nor in {tmp_path}, and it cannot be fetched from the hub"
    )
    assert len(said.splitlines()) == 1 and ("Please check" in said or "Repo id must use" in said)


@pytest.mark.parametrize("source", ["./nowhere", "nowhere", "nowhere.gguf", "/nowhere/at/all", "a/b/c"])
def test_no_such_model(source, tmp_path):
    with pytest.raises(InputError, match=r"there is no model at .*: copy it there or name a hub id"):
        prepare(source, tmp_path, tmp_path / "cache")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "model.gguf").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="is no GGUF file"):
        prepare("model.bin", tmp_path, tmp_path / "cache")
    with pytest.raises(InputError, match=r"model\.gguf cannot be read"):
        prepare("model.gguf", tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TimeoutError("the lock")])
def test_a_full_disk_or_a_held_lock_is_a_sentence_and_an_exit_code(error, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def fail(*_):
        raise error

    monkeypatch.setattr(import_module("edge_runtime.models.prepare"), "digest", fail)
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["prepare", str(tmp_path), "--models", ".", "--cache", cache])
    assert main() == InputError.exit_code
    assert capsys.readouterr().err == f"{tmp_path} cannot be prepared in {cache}: {error}\n"


def test_two_processes_may_prepare_the_same_model_at_once(tiny_folder, tmp_path):
    cache = tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "edge_runtime.models.prepare",
        "tiny",
        "--models",
        str(tiny_folder.parent),
    ]
    both = [
        subprocess.Popen([*command, "--cache", str(cache)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=1000) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    folders = [path for path in cache.iterdir() if path.is_dir() and path.name != "digests"]
    assert [path.name.split("-")[0] for path in folders] == ["tiny"]


def test_the_weights_alone_make_the_class_and_every_file_makes_the_facts(tiny_folder, tmp_path):
    first = shutil.copytree(tiny_folder, tmp_path / "model")
    hub = shutil.copytree(tiny_folder, tmp_path / "models--owner--model" / "snapshots" / "0123abcd")
    other = shutil.copytree(tiny_folder, tmp_path / "other" / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    found = [prepare(str(folder), tmp_path, tmp_path / "cache") for folder in (first, hub, other)]
    assert len({facts.model_class for facts in found}) == 1
    assert found[0].model_class.startswith("model@")
    assert found[0].folder == found[1].folder != found[2].folder


def test_the_class_is_named_by_the_catalogs_source_and_not_by_where_a_link_leads(tiny_folder, tmp_path):
    """A model class travels to the node; where a device keeps its files is its own affair."""
    private = shutil.copytree(tiny_folder, tmp_path / "models--acme--private" / "snapshots" / "private-name")
    (tmp_path / "base").symlink_to(private)
    assert prepare("base", tmp_path, tmp_path / "cache").model_class.startswith("base@")


def _versions(**others):
    return lambda package: others.get(package.replace("-", "_")) or version(package)


@pytest.mark.parametrize(
    ("writer", "other"),
    [
        ("FORMAT", 1),  # what the first version wrote is read no more
        *(("version", _versions(**{package: "99.0"})) for package in ("transformers", "tokenizers", "gguf")),
        ("version", _versions(edge_runtime="99.0")),
    ],
)
def test_another_version_of_whoever_writes_prepares_again(tiny_folder, tmp_path, monkeypatch, writer, other):
    cache = tmp_path / "cache"
    before = prepare(str(tiny_folder), tmp_path, cache)
    file = Path(before.folder) / "facts.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "positions": 7}))
    assert prepare(str(tiny_folder), tmp_path, cache).positions == 7  # the same version reads the cache
    monkeypatch.setattr(import_module("edge_runtime.models.prepare"), writer, other)
    after = prepare(str(tiny_folder), tmp_path, cache)
    assert after == msgspec.structs.replace(before, folder=after.folder) and after.folder != before.folder


def test_a_package_that_is_not_installed_has_no_version_to_write_down(tiny_folder, tmp_path, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(import_module("edge_runtime.models.prepare"), "version", missing)
    assert prepare(str(tiny_folder), tmp_path, tmp_path / "cache").layers == 4
