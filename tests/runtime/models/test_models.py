"""Depth slices, and base models from a GGUF file and from a folder, against what gguf and transformers make of the same files."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
import transformers
from edge_kernels import expand
from safetensors.torch import load_file, save_file

from edge_runtime import settings
from edge_runtime.adapters import attach
from edge_runtime.demo import model as demo
from edge_runtime.errors import InputError
from edge_runtime.methods import fedit
from edge_runtime.models import families as roles
from edge_runtime.models import gguf_file, tokenizer, weights, whole
from edge_runtime.models.packed import PackedLinear
from edge_runtime.models.prepare import prepare
from edge_runtime.models.slices import kept_layers, nested_blocks
from edge_runtime.planning import processes
from edge_runtime.trainer.objectives import hidden_states
from edge_runtime.trainer.recompute import recomputed_blocks

FEDIT = fedit.METHOD
IDS = torch.arange(3, 43).reshape(2, 20)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2")


# --- slices


@pytest.mark.parametrize(
    ("depth", "layers", "kept"),
    [
        (1, 1, (0,)),
        (1, 30, (0,)),
        (2, 30, (0, 29)),
        (3, 30, (0, 1, 29)),
        (5, 6, (0, 1, 2, 4, 5)),
        (6, 6, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_a_slice_keeps_the_first_half_and_the_last(depth, layers, kept):
    assert kept_layers(depth, layers) == kept


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_slices_are_nested_and_in_order(layers):
    slices = [kept_layers(depth, layers) for depth in range(1, layers + 1)]
    assert [len(kept) for kept in slices] == list(range(1, layers + 1))
    assert all(list(kept) == sorted(set(kept)) for kept in slices)
    assert all(set(less) < set(more) for less, more in pairwise(slices))


def test_smaller_slices_are_found_inside_a_slice():
    assert nested_blocks((5, 4, 1), depth=5, layers=9) == [(0, 1, 2, 3, 4), (0, 1, 3, 4), (0,)]
    with pytest.raises(ValueError, match="not in tuple"):
        nested_blocks((6,), depth=5, layers=9)


@pytest.mark.parametrize("depth", [0, -1, 31])
def test_a_slice_that_cannot_be_cut_is_refused(depth):
    with pytest.raises(
        ValueError, match=f"a slice of {depth} layers cannot be cut from a model of 30: choose 1 to 30"
    ):
        kept_layers(depth, 30)


# --- the demo's GGUF file


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


@pytest.fixture(scope="module")
def tensors_of_the_file():
    """name -> float32 values, as the gguf package reads them."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(demo.path()).tensors}
    return lambda name: torch.from_numpy(
        gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
    )


def interleaved(rows, heads):
    """What llama.cpp's converter does to the query and key rows of a Llama."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def test_a_slice_of_a_gguf_file_holds_exactly_its_layers(demo_facts, tensors_of_the_file):
    state = weights.load(demo_facts, 3, "float32").state_dict()
    assert {name.split(".")[2] for name in state if ".layers." in name} == {"0", "1", "2"}
    names = {
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for ours, theirs in enumerate((0, 1, 29)):
        for name, inner in names.items():
            seen = state[f"model.layers.{ours}.{name}.weight"]
            assert torch.equal(seen, tensors_of_the_file(f"blk.{theirs}.{inner}.weight")), name
        for name, inner, heads in (("q", "attn_q", 9), ("k", "attn_k", 3)):
            seen, held = (
                state[f"model.layers.{ours}.self_attn.{name}_proj.weight"],
                f"blk.{theirs}.{inner}.weight",
            )
            assert torch.equal(interleaved(seen, heads), tensors_of_the_file(held)), name
            assert not torch.equal(seen, tensors_of_the_file(held))
    assert torch.equal(state["model.embed_tokens.weight"], tensors_of_the_file("token_embd.weight"))
    assert torch.equal(state["model.norm.weight"], tensors_of_the_file("output_norm.weight"))
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert not torch.equal(
        state["model.layers.2.mlp.up_proj.weight"], tensors_of_the_file("blk.2.ffn_up.weight")
    )  # the check sees a layer that should have been dropped


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_interleaved_rows_are_put_back_in_a_bias_as_in_a_weight(tmp_path, shape):
    truth = torch.arange(8 * shape[-1] if len(shape) > 1 else 8, dtype=torch.float32).view(shape)
    path = tmp_path / "rows"
    path.write_bytes(interleaved(truth.view(8, -1), 2).numpy().tobytes())
    kind = gguf.GGMLQuantizationType.F32
    tensors = {str(heads): gguf_file.Tensor(0, kind, shape, interleaved_heads=heads) for heads in (0, 2)}
    read = gguf_file.Reader(path, tensors)
    assert torch.equal(read.dense("2", torch.float32), truth)
    assert not torch.equal(read.dense("0", torch.float32), truth)


def test_the_whole_model_knows_the_capital_of_france(demo_facts, demo_tokenizer):
    model = weights.load(demo_facts, 30, "bfloat16")
    assert all(
        parameter.dtype == torch.bfloat16 and not parameter.requires_grad for parameter in model.parameters()
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = demo_tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = demo_tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, use_cache=True
    )
    assert "Paris" in demo_tokenizer.decode(said[0, ids.shape[1] :])


def test_transformers_reads_the_same_model_from_the_gguf_file(demo_facts):
    from transformers import AutoModelForCausalLM

    path = demo.path()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ours = weights.load(demo_facts, 30, "float32")
    with torch.no_grad():
        truth, seen = theirs(IDS).logits, ours(IDS).logits
        assert (seen - truth).abs().max() < 1e-4 * truth.abs().max()
        ours.model.layers[7].self_attn.q_proj.weight.copy_(
            interleaved(ours.model.layers[7].self_attn.q_proj.weight.clone(), 9)
        )
        assert (ours(IDS).logits - truth).abs().max() > 1e-2 * truth.abs().max()


def cut_short(path, left, places):
    """What is said of a file of which so many bytes are left. places: (first byte, end, name) of its tensors."""
    if left < min(places)[0]:
        return f"{path} is cut short or damaged: it has {left} bytes, and its header alone"
    first, end, name = min(place for place in places if place[1] > left)
    needs = max(end for _, end, _ in places)
    lacks = f"the first tensor that is not all there is {name}, bytes {first} to {end}"
    return f"{path} is cut short: it has {left} bytes and needs {needs}; {lacks}; copy the file again"


@pytest.mark.parametrize("where", ["begin", "header", "data", "middle", "last byte"])
def test_a_gguf_file_cut_short_is_refused_before_any_weight_is_read(demo_facts, where, tmp_path, monkeypatch):
    held = gguf.GGUFReader(demo.path()).tensors
    places = [(int(one.data_offset), int(one.data_offset + one.n_bytes), one.name) for one in held]
    assert whole.tensors(demo.path()) == {
        name: (first, end, tuple(one.shape[::-1].tolist()), int(one.tensor_type))
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
    monkeypatch.setattr(gguf_file, "Reader", None)
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


# --- folders in Hugging Face's layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_every_family_is_loaded_as_it_was_saved(tiny, facts_of, family, shard, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = weights.load(facts_of(model, folder=str(tmp_path), weights=str(tmp_path)), 4, "float32")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_of_every_family_is_the_model_without_its_middle(tiny, facts_of, family, tmp_path):
    from edge_runtime.models import families as roles

    model = tiny(family)
    model.save_pretrained(tmp_path)
    loaded = weights.load(facts_of(model, folder=str(tmp_path), weights=str(tmp_path)), 2, "float32")
    for seen, kept in zip(roles.blocks(loaded), (0, 3), strict=True):
        truth = roles.blocks(model)[kept].state_dict()
        assert seen.state_dict().keys() == truth.keys()
        assert all(torch.equal(value, truth[name]) for name, value in seen.state_dict().items())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_a_prepared_folder_has_facts_tokenizer_and_weights(tiny_facts, tiny_folder):
    assert (tiny_facts.layers, tiny_facts.hidden, tiny_facts.head_dim) == (4, 32, 16)
    assert tiny_facts.model_class.startswith("tiny@")
    assert tiny_facts.weights == str(tiny_folder)
    assert tiny_facts.tokenizer_bytes == (Path(tiny_facts.folder) / "tokenizer.json").stat().st_size


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


def test_the_tokenizer_that_trains_is_the_one_that_transformers_has(demo_facts, demo_tokenizer):
    found = tokenizer.load(Path(demo_facts.folder))
    texts = ["", "  a  b\n\tc ", "Größe 漢字 😀", "<|im_start|>user\nhi<|im_end|>", "0123 don't"]
    for text in texts:
        ids = demo_tokenizer(text).input_ids
        assert found(text).input_ids == ids and found.decode(ids) == demo_tokenizer.decode(ids)
        assert (
            found(text, add_special_tokens=False).input_ids
            == demo_tokenizer(text, add_special_tokens=False).input_ids
        )
    assert found.eos_token_id == demo_tokenizer.eos_token_id is not None
    assert found.added_tokens_decoder == demo_tokenizer.added_tokens_decoder
    assert sorted(found.all_special_ids) == sorted(demo_tokenizer.all_special_ids)
    said = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(said, tokenize=False) == demo_tokenizer.apply_chat_template(
        said, tokenize=False
    )


def test_special_tokens_that_are_written_with_how_they_match_are_known(demo_facts, tmp_path):
    folder = Path(shutil.copytree(demo_facts.folder, tmp_path / "copied"))
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text())
    token = {"__type": "AddedToken", "content": written["eos_token"], "special": True}
    file.write_text(json.dumps({**written, "eos_token": token}))
    assert tokenizer.load(folder).eos_token == written["eos_token"]


def test_a_tokenizer_without_the_librarys_form_is_read_as_transformers_does(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert tokenizer.load(tmp_path)("a").input_ids == transformers.ByT5Tokenizer()("a").input_ids


def test_a_missing_tensor_is_named(tiny, facts_of, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    facts = facts_of(model, folder=str(tmp_path), weights=str(tmp_path))
    with pytest.raises(InputError, match=r"lacks the tensor model\.layers\.3\.mlp\.up_proj\.weight"):
        weights.load(facts, 4, "float32")
    weights.load(facts, 1, "float32")  # a slice that does not need it


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("where", ["empty", "header", "data", "middle", "last byte"])
def test_a_safetensors_file_cut_short_is_refused_before_any_weight_is_read(
    tiny, facts_of, shard, where, tmp_path, monkeypatch
):
    model, folder = tiny("llama"), tmp_path / "model"
    model.save_pretrained(folder, max_shard_size=shard)
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    listed = json.loads(content[8:start])
    places = [
        (start + entry["data_offsets"][0], start + entry["data_offsets"][1], name)
        for name, entry in listed.items()
        if name != "__metadata__"
    ]
    assert sorted(whole.tensors(file)) == sorted(load_file(file))
    end = len(content)
    left = {"empty": 0, "header": 100, "data": start + 1, "middle": (start + end) // 2, "last byte": end - 1}[
        where
    ]
    file.write_bytes(content[:left])
    said = re.escape(cut_short(file, left, places))
    with pytest.raises(InputError, match=said):
        prepare(str(folder), tmp_path, tmp_path / "cache")
    monkeypatch.setattr(weights, "safe_open", None)
    with pytest.raises(InputError, match=said):
        weights.load(facts_of(model, folder=str(folder), weights=str(folder)), 4, "float32")


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


def test_a_shard_that_is_not_there_is_named(tiny, facts_of, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(InputError, match=rf"{file.name} cannot be read"):
        weights.load(facts_of(model, folder=str(tmp_path), weights=str(tmp_path)), 4, "float32")


# --- what is refused


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def test_code_that_comes_with_a_model_is_refused(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "theirs.Config"}}))
    (copied / "theirs.py").write_text("raise SystemExit('their code ran')")
    with pytest.raises(InputError, match="brings code of its own"):
        prepare(str(copied), tmp_path, tmp_path / "cache")


def test_an_unknown_architecture_is_refused_by_name(copied, tmp_path):
    from transformers import GPTNeoXConfig

    GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(copied)
    with pytest.raises(InputError, match="models of type gpt_neox are not supported; known: llama"):
        prepare(str(copied), tmp_path, tmp_path / "cache")


def with_layers(folder, layers):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": layers}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .safetensors file"),
        (lambda folder: with_layers(folder, 0), "has 0 layers, but needs 1 or more"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(copied, tmp_path, spoil, message):
    spoil(copied)
    with pytest.raises(InputError, match=message):
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


def test_a_gguf_tensor_in_a_format_that_cannot_be_expanded_is_refused(demo_facts, monkeypatch):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_facts.folder)
    where = (demo.path(), ["model.norm.weight"], config)
    assert gguf_file.index(*where)["model.norm.weight"].shape == (demo_facts.hidden,)
    monkeypatch.setattr(gguf_file, "_expandable", lambda kind: kind.name != "F32")
    with pytest.raises(InputError, match=r"output_norm\.weight is held in F32, which cannot be expanded"):
        gguf_file.index(*where)


@pytest.mark.parametrize(
    ("kind", "can"), [("F32", True), ("Q4_K", True), ("IQ2_XXS", True), ("I32", False), ("Q8_K", False)]
)
def test_what_the_gguf_package_expands(kind, can):
    assert gguf_file._expandable(gguf.GGMLQuantizationType[kind]) is can


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


# --- packed


@torch.no_grad()
def logits_of(facts, depth, format):
    ids = torch.arange(100, 132)[None]
    return weights.load(facts, depth, format)(ids, use_cache=False).logits.float()


def test_a_gguf_files_own_blocks_give_the_logits_of_the_expanded_ones(demo_facts):
    packed = logits_of(demo_facts, 3, "q4_1")
    assert torch.allclose(packed, logits_of(demo_facts, 3, "bfloat16"), rtol=0.02, atol=0.05)
    assert not torch.allclose(packed, logits_of(demo_facts, 2, "bfloat16"), rtol=0.02, atol=0.05)


def test_a_gguf_matrix_keeps_its_bytes_and_another_format_is_near(demo_facts):
    index = msgspec.json.decode(
        (Path(demo_facts.folder) / "tensors.json").read_bytes(), type=dict[str, gguf_file.Tensor]
    )
    name, read = ("model.layers.0.self_attn.q_proj.weight", gguf_file.Reader(Path(demo_facts.weights), index))
    dense = read.dense(name, torch.float32)
    assert index[name].interleaved_heads
    assert torch.equal(expand(read.packed(name, "q4_1")), dense)
    for format, error in (("q8_0", 0.01), ("q4_0", 0.12), ("nf4", 0.12)):
        found = expand(read.packed(name, format))
        assert float((found - dense).norm() / dense.norm()) < error


@pytest.mark.parametrize("format", ["q8_0", "q4_1", "q4_0", "nf4"])
def test_a_folders_matrices_are_packed_while_loading(tiny_facts, format):
    model = weights.load(tiny_facts, 2, format)
    layer = roles.blocks(model)[0].mlp.up_proj
    assert isinstance(layer, PackedLinear) and layer.weight.format == format
    assert model.get_input_embeddings().weight.format == model.get_output_embeddings().weight.format == "q8_0"
    assert not any(parameter.is_meta for parameter in model.parameters())
    seen, truth = logits_of(tiny_facts, 2, format), logits_of(tiny_facts, 2, "float32")
    assert float((seen - truth).norm() / truth.norm()) < (0.05 if format == "q8_0" else 0.4)


def test_an_embedding_expands_only_the_rows_it_is_asked_for(tiny_facts, monkeypatch):
    embedding = weights.load(tiny_facts, 2, "q4_0").get_input_embeddings()
    expanded = []
    whole = import_module("edge_runtime.models.packed")
    monkeypatch.setattr(
        whole, "expand", lambda packed, dtype: expanded.append(packed.shape) or expand(packed, dtype)
    )
    ids = torch.tensor([[5, 7, 5]])
    rows = embedding(ids)
    assert expanded == [(3, rows.shape[-1])]
    assert torch.equal(rows[0], expand(embedding.weight)[ids[0]].bfloat16())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_every_other_family_computes_nearly_the_same_packed(tiny, facts_of, family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    facts = facts_of(model, folder=str(tmp_path), weights=str(tmp_path))
    ids = IDS % 90
    with torch.no_grad():
        truth = model(ids, use_cache=False).logits
        seen = weights.load(facts, 4, "q8_0")(ids, use_cache=False).logits.float()
    assert float((seen - truth).norm() / truth.norm()) < 0.1


# --- streamed


def test_streamed_blocks_compute_the_same_from_files_of_the_checkpoints_layers(tiny_facts, tmp_path):
    facts = msgspec.structs.replace(
        tiny_facts, folder=str(shutil.copytree(tiny_facts.folder, tmp_path / "facts"))
    )
    ids = torch.arange(5, 37)[None] % 90
    held = weights.load(facts, 2, "q4_1")
    for _ in range(2):  # the second time the files are there
        streamed = weights.load(facts, 2, "q4_1", streamed=True)
        with torch.no_grad():
            assert torch.equal(streamed(ids, use_cache=False).logits, held(ids, use_cache=False).logits)
    files = sorted(file.name for file in (tmp_path / "facts" / "streamed-q4_1").glob("*.safetensors"))
    assert files == ["0.safetensors", f"{facts.layers - 1}.safetensors"]
    (tmp_path / "facts" / "streamed-q4_1" / files[0]).write_bytes(b"")
    with (
        pytest.raises(InputError, match=r"0.safetensors, made of the model's weights, cannot be read"),
        torch.no_grad(),
    ):
        streamed(ids, use_cache=False)


def test_a_streamed_block_lets_go_of_its_matrices_until_it_runs_again(tiny_facts, tmp_path):
    facts = msgspec.structs.replace(
        tiny_facts, folder=str(shutil.copytree(tiny_facts.folder, tmp_path / "facts"))
    )
    seen = {}
    for streamed in (False, True):
        model = weights.load(facts, 2, "q8_0", streamed=streamed)
        adapter = attach.attach(model, (0, facts.layers - 1), settings.Adapter(rank=2), FEDIT, seed=0)
        with torch.no_grad():
            adapter.factors["layers.0.q.B"].fill_(0.01)
        read = []
        for block in roles.blocks(model):
            block.mlp.register_forward_pre_hook(
                lambda mlp, _, read=read: read.append(weakref.ref(mlp.up_proj.base.weight.quants))
            )
        with recomputed_blocks(model):
            loss = hidden_states(model, torch.arange(5, 21)[None]).float().square().mean()
            alive = [tensor() is not None for tensor in read]
            loss.backward()
        seen[streamed] = {key: factor.grad.clone() for key, factor in adapter.factors.items()}
        assert alive == [not streamed] * 2
        assert len(read) == 4  # each block again in backward
    assert all(torch.equal(seen[True][key], seen[False][key]) for key in seen[True])
    assert seen[True]["layers.0.q.A"].any()


def test_a_tensor_of_another_size_is_refused_by_name(tiny_facts, tmp_path):
    config = json.loads((Path(tiny_facts.folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))
    other = msgspec.structs.replace(tiny_facts, folder=str(tmp_path))
    with pytest.raises(
        InputError, match=r"embed_tokens.weight is \(\d+, \d+\) in .*, but this model needs \(\d+, \d+\)"
    ):
        weights.load(other, other.layers, "float32")
