"""Weight files that are cut short or damaged are refused before any weight is read."""

import functools
import json
import re

import gguf
import msgspec
import pytest
from safetensors.torch import load_file

from edge_runtime.demo import model as demo
from edge_runtime.errors import InputError
from edge_runtime.models import gguf_file, gguf_header, headers, readers, weights
from edge_runtime.models.prepare import prepare


def cut_short(path, left, places):
    """The message about a file with so many bytes left. places: (first byte, end, name)."""
    if left < min(places)[0]:
        return f"{path} is cut short or damaged: it has {left} bytes, and its header alone"
    first, end, name = min(place for place in places if place[1] > left)
    needs = max(end for _, end, _ in places)
    lacks = f"the first tensor that is not all there is {name}, bytes {first} to {end}"
    return f"{path} is cut short: it has {left} bytes and needs {needs}; {lacks}; copy the file again"


@functools.cache
def held_by_the_demo():
    """The tensors of the demo's file as the gguf package reads them, which takes seconds."""
    return gguf.GGUFReader(demo.path()).tensors


@pytest.mark.parametrize("where", ["begin", "header", "data", "middle", "last byte"])
def test_a_gguf_file_cut_short_is_refused_before_any_weight_is_read(demo_facts, where, tmp_path, monkeypatch):
    held = held_by_the_demo()
    places = [(int(one.data_offset), int(one.data_offset + one.n_bytes), one.name) for one in held]
    assert gguf_header.read(demo.path(), values=False).tensors == {
        name: (first, end, tuple(one.shape[::-1].tolist()), int(one.tensor_type), 0, "")
        for (first, end, name), one in zip(places, held, strict=True)
    }
    start, end = min(places)[0], max(places)[1]
    left = {"begin": 3, "header": start // 2, "data": start + 1, "middle": end // 2, "last byte": end - 1}[
        where
    ]
    path = tmp_path / "cut.gguf"
    with demo.path().open("rb") as stream:
        path.write_bytes(stream.read(left))
    said = re.escape(cut_short(path, left, places))
    with pytest.raises(InputError, match=said):
        prepare(str(path), tmp_path, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [
        "digests"
    ]  # nothing half made
    monkeypatch.setattr(gguf_file, "GGUFTensors", None)
    for format in ("bfloat16", "q4_1"):
        with pytest.raises(InputError, match=said):  # it was whole when it was prepared
            weights.load(msgspec.structs.replace(demo_facts, weights=str(path)), 30, format)


def test_a_damaged_gguf_header_is_refused(tmp_path):
    with demo.path().open("rb") as stream:
        content = stream.read(200_000)
    kind = content.index(b"general.architecture") + len("general.architecture")
    key = kind - len("general.architecture") - 8
    for at, bytes_, said in (
        (0, b"GGML", "it does not begin with GGUF"),
        (4, b"\0\0\0\3", "its version is 50331648, but has to be one of"),  # the other byte order
        (key, b"\xff" * 8, "needs 18446744073709551"),
        (kind, b"\x63", "a value in its header is of kind 99"),
    ):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(content[:at] + bytes_ + content[at + len(bytes_) :])
        with pytest.raises(InputError, match=rf"damaged\.gguf .*{said}"):
            prepare(str(path), tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("where", ["empty", "header", "data", "middle", "last byte"])
def test_a_safetensors_file_cut_short_is_refused_before_any_weight_is_read(
    tiny, facts_of, shard, where, tmp_path, monkeypatch
):
    model, folder = tiny("llama"), tmp_path / "model"
    model.save_pretrained(folder, max_shard_size=shard)
    facts = facts_of(model, folder=str(folder), weights=str(folder))
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    listed = json.loads(content[8:start])
    places = [
        (start + entry["data_offsets"][0], start + entry["data_offsets"][1], name)
        for name, entry in listed.items()
        if name != "__metadata__"
    ]
    assert sorted(headers.tensors(file)) == sorted(load_file(file))
    end = len(content)
    left = {"empty": 0, "header": 100, "data": start + 1, "middle": (start + end) // 2, "last byte": end - 1}[
        where
    ]
    file.write_bytes(content[:left])
    said = re.escape(cut_short(file, left, places))
    with pytest.raises(InputError, match=said):
        prepare(str(folder), tmp_path, tmp_path / "cache")
    monkeypatch.setattr(readers, "safe_open", None)
    with pytest.raises(InputError, match=said):
        weights.load(facts, 4, "float32")  # it was whole when it was prepared


def test_a_damaged_safetensors_header_or_index_is_refused(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    content, listing = file.read_bytes(), tmp_path / "model" / "model.safetensors.index.json"
    for spoilt, said in (
        (content[:9] + b"&" + content[10:], "cannot be read: JSON is malformed"),
        (b"\xff" * 8 + content[8:], "is cut short or damaged"),
        (
            content.replace(b'"data_offsets"', b'"data_offset_"', 1),
            "cannot be read: Object missing required field",
        ),
    ):
        file.write_bytes(spoilt)
        with pytest.raises(InputError, match=f"{file.name} {said}"):
            prepare("model", tmp_path, tmp_path / "cache")
    listing.write_text("{}")
    with pytest.raises(InputError, match=rf"{listing.name} cannot be read: .*weight_map"):
        prepare("model", tmp_path, tmp_path / "cache")
