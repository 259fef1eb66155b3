"""Headers of GGUF files: models split over files are read whole or refused by the file that is wrong."""

import hashlib
import re

import gguf
import pytest
import torch

from benchmarks import gguf_models, model_cases
from edge_runtime.errors import InputError
from edge_runtime.models import gguf_header, weights
from edge_runtime.models.prepare import prepare


@pytest.fixture
def split(tmp_path):
    """A model over three files, and the same model in one."""
    model = model_cases.build("llama", "untied")
    whole = gguf_models.write(model, tmp_path / "whole.gguf")
    gguf_models.write(model, tmp_path / "big.gguf", tensors_a_file=8)
    files = sorted(tmp_path.glob("big-*.gguf"))
    assert [file.name for file in files] == [f"big-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return whole, files


@torch.no_grad()
def test_a_split_model_is_the_whole_model(split, tmp_path):
    whole, files = split
    facts = {path: prepare(str(path), tmp_path, tmp_path / "cache") for path in (whole, files[0])}
    logits = [weights.load(f, f.layers, "float32")(model_cases.ids()).logits for f in facts.values()]
    assert torch.equal(*logits)
    assert facts[files[0]].model_class.startswith("big@")
    content = bytearray(files[2].read_bytes())
    content[-1] ^= 1  # in the last of its tensors
    files[2].write_bytes(content)
    other = prepare(str(files[0]), tmp_path, tmp_path / "cache")
    assert other.model_class != facts[files[0]].model_class  # the class is that of all files


def test_another_file_than_the_first_is_refused_and_names_the_first(split, tmp_path):
    _, files = split
    with pytest.raises(
        InputError, match=r"big-00002-of-00003\.gguf is file 2 of 3 .* big-00001-of-00003\.gguf"
    ):
        prepare(str(files[1]), tmp_path, tmp_path / "cache")


def test_files_that_are_missing_are_named(split, tmp_path):
    _, files = split
    files[1].unlink()
    with pytest.raises(InputError, match=r"are missing: big-00002-of-00003\.gguf; copy them"):
        prepare(str(files[0]), tmp_path, tmp_path / "cache")


def test_files_that_do_not_belong_together_are_refused(split, tmp_path):
    _, files = split
    second = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(InputError, match=r"file 3 of 3 by its metadata .* but file 2 of 3 by its name"):
        gguf_header.read(files[0])
    files[1].write_bytes(second)
    gguf_header.read(files[0])
    alone = files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"file 1 of 3 by its metadata .* but file 1 of 1 by its name"):
        gguf_header.read(alone)


@pytest.mark.parametrize(
    ("shard", "reason"), [(2, "cannot be read: it has"), (0, "and a file before it both have")]
)
def test_a_tensor_that_is_there_twice_is_refused_by_name(split, shard, reason):
    """shard: of the tensor whose name a tensor of the last file takes."""
    _, files = split
    tensors = gguf_header.read(files[0]).tensors
    last, other = (sorted(name for name in tensors if tensors[name].shard == n) for n in (2, shard))
    old, name = next((a, b) for a in last for b in other if a != b and len(a) == len(b))
    content = files[2].read_bytes()
    assert content.count(old.encode()) == 1
    files[2].write_bytes(content.replace(old.encode(), name.encode()))
    with pytest.raises(InputError, match=rf"00003\.gguf {reason} the tensor {re.escape(name)}"):
        gguf_header.read(files[0])


@pytest.mark.parametrize(("field", "value"), [("kind", 1), ("place", 32)])
def test_a_tensor_that_is_not_behind_the_one_before_it_is_refused(split, field, value):
    """A damaged kind or place in the header would make other numbers of the file's bytes."""
    whole, _ = split
    gguf_header.read(whole)
    content, name = bytearray(whole.read_bytes()), b"blk.1.attn_q.weight"
    kind = content.index(name) + len(name) + 4 + 2 * 8  # behind the number of sides, and two of them
    content[kind if field == "kind" else kind + 4] ^= value
    whole.write_bytes(content)
    with pytest.raises(InputError, match=r"begins at byte \d+ of the tensors, but has to at \d+"):
        gguf_header.read(whole)


def test_a_link_to_a_file_of_another_name_is_read(split, tmp_path):
    whole, _ = split
    hidden = whole.rename(tmp_path / hashlib.sha256(b"whole").hexdigest())  # as the hub's cache keeps it
    (tmp_path / "link.gguf").symlink_to(hidden)
    facts = prepare("link.gguf", tmp_path, tmp_path / "cache")
    assert weights.load(facts, 1, "float32").config.num_hidden_layers == 1


def test_every_kind_of_value_is_read_as_the_gguf_package_reads_it(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "all.gguf"), "llama")
    for n, kind in enumerate(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")):
        getattr(writer, f"add_{kind}")(f"key.{kind}", 3 + n)
    (
        writer.add_float32("key.float", 0.5),
        writer.add_float64("key.double", 0.1),
        writer.add_bool("key.bool", True),
    )
    writer.add_string("key.text", "täxt")
    writer.add_array("key.numbers", [1, 2, 3]), writer.add_array("key.texts", ["a", "ü"])
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    theirs = gguf.GGUFReader(tmp_path / "all.gguf").fields
    ours = gguf_header.read(tmp_path / "all.gguf").metadata
    assert len(ours) == 15
    for key, value in ours.items():
        assert (list(value) if isinstance(value, tuple) else value) == theirs[key].contents(), key


@pytest.mark.parametrize("version", [1, 4, 3 << 24])  # the last: of the other byte order
def test_other_versions_and_byte_orders_are_refused(version, tmp_path):
    path = gguf_models.write(model_cases.build("llama", "tied"), tmp_path / "model.gguf")
    content = path.read_bytes()
    path.write_bytes(content[:4] + version.to_bytes(4, "little") + content[8:])
    with pytest.raises(InputError, match=re.escape(f"its version is {version}, but has to be one of (2, 3)")):
        prepare(str(path), tmp_path, tmp_path / "cache")
