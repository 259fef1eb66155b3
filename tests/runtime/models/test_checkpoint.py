"""The files of a folder that are the model are those that transformers takes."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_runtime.errors import InputError
from edge_runtime.models import checkpoint, weights
from edge_runtime.models.prepare import prepare

IDS = torch.arange(3, 23)[None]


@pytest.fixture
def folder(tiny, tmp_path):
    """folder(name, seed, shard): a random model of its own in files of this size."""

    def save(name, seed, shard="1GB"):
        model = tiny("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return save


@torch.no_grad()
def logits(facts_of, path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = weights.load(facts_of(model, folder=str(path), weights=str(path)), 4, "float32")
    return ours(IDS).logits, model(IDS).logits


def test_a_whole_model_comes_before_the_shards_of_an_earlier_save(folder, facts_of):
    path = folder("model", 1, "20KB")
    shutil.copy(folder("newer", 2) / "model.safetensors", path)
    assert checkpoint.weight_files(path) == [path / "model.safetensors"]
    seen, truth = logits(facts_of, path)
    assert torch.equal(seen, truth)
    assert not torch.equal(seen, logits(facts_of, folder("older", 1))[1])


def test_a_copy_in_another_precision_is_not_read(folder, facts_of):
    path = folder("model", 1)
    shutil.copy(folder("other", 2) / "model.safetensors", path / "model.fp16.safetensors")
    seen, truth = logits(facts_of, path)
    assert torch.equal(seen, truth)


def test_stale_shards_beside_the_index_are_not_read(folder, facts_of):
    path = folder("model", 1, "20KB")
    (path / "model-00099-of-00099.safetensors").write_bytes(b"stale")
    seen, truth = logits(facts_of, path)
    assert torch.equal(seen, truth)


def test_a_single_file_of_another_name_is_the_model(folder):
    path = folder("model", 1)
    (path / "model.safetensors").rename(path / "mine.safetensors")
    assert checkpoint.weight_files(path) == [path / "mine.safetensors"]


def test_several_files_without_an_index_are_refused_by_their_names(folder):
    path = folder("model", 1)
    shutil.copy(path / "model.safetensors", path / "b.safetensors")
    (path / "model.safetensors").rename(path / "a.safetensors")
    with pytest.raises(InputError, match=r"is not known: a\.safetensors, b\.safetensors; name the model's"):
        checkpoint.weight_files(path)


def test_a_shard_that_is_not_there_is_named(folder):
    path = folder("model", 1, "20KB")
    file = sorted(path.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(InputError, match=f"names {re.escape(file.name)}, which is not in the folder"):
        checkpoint.weight_files(path)


def test_a_folder_of_bin_files_alone_is_refused_with_what_to_do(folder):
    path = folder("model", 1)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not read.*save it with save_pretrained"):
        checkpoint.weight_files(path)


def test_a_tensor_that_two_shards_have_is_refused(folder, tmp_path):
    path = folder("model", 1, "20KB")
    listing = path / checkpoint.INDEX
    index = json.loads(listing.read_text())
    index["weight_map"]["stale"] = "stale.safetensors"
    listing.write_text(json.dumps(index))
    shutil.copy(sorted(path.glob("model-*"))[0], path / "stale.safetensors")
    with pytest.raises(InputError, match=r"model-00001-\S+ and \S+stale\.safetensors both have the tensor"):
        prepare(str(path), tmp_path, tmp_path / "cache")


def test_the_model_class_is_of_the_files_that_are_read(tiny_folder, tmp_path):
    path = shutil.copytree(tiny_folder, tmp_path / "model")
    before = prepare(str(path), tmp_path, tmp_path / "cache").model_class
    (path / "model.fp16.safetensors").write_bytes(b"other")
    assert prepare(str(path), tmp_path, tmp_path / "cache").model_class == before
    with (path / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x01\x02\x03\x04")
    assert prepare(str(path), tmp_path, tmp_path / "cache").model_class != before
