"""Exports of a tiny model: each is opened by the tool that it is for, and a wrong one leaves nothing behind."""

from pathlib import Path

import edge_profiles
import gguf
import msgspec
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import gguf_models
from edge_runtime import settings
from edge_runtime.adapters import attach, learned
from edge_runtime.adapters.export import base, check, forms, gguf_adapter, gguf_model, tools
from edge_runtime.adapters.export.check import Outputs
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.methods import fedit
from edge_runtime.models import gguf_header
from edge_runtime.models.prepare import prepare
from edge_runtime.models.slices import kept_layers
from edge_runtime.state import MARK
from edge_runtime.trainer.examples import Example
from edge_runtime.trainer.objectives import hidden_states, label_states

SPEC = settings.Adapter(rank=3, alpha=11.0)
Kind = gguf.GGMLQuantizationType
# llama.cpp and ours, both in float32; GELU is a table of half precision there
CLOSE = {"llama": 1e-4, "phi3": 1e-4, "gemma": 2e-2, "gpt2": 2e-2, "phi": 2e-2}


def adapter_on(model, facts, depth=4, size=0.1, labels=()):
    """Random factors on the slice of this depth."""
    layers, draw = kept_layers(depth, facts.layers), np.random.default_rng(0)
    state = attach.state(attach.attach(model, layers, SPEC, fedit.METHOD, 0, facts.layers))
    state = {key: draw.normal(0, size, value.shape).astype(np.float32) for key, value in state.items()}
    state |= {f"labels.{label}.H": draw.normal(size=(1, facts.hidden)).astype(np.float32) for label in labels}
    return learned.fold(state, facts, layers, SPEC, fedit.METHOD, 3)


@pytest.fixture(scope="module")
def saved(tiny, cache, tmp_path_factory):
    """saved(family, form, depth, kind): the adapter, whose base is a file of the tiny model in this form."""

    def make(family="llama", form="folder", depth=4, kind=Kind.F32, size=0.1, labels=(), **changes):
        home = tmp_path_factory.mktemp("base")
        # blocks of 32 values
        width = {"hidden_size": 64, "intermediate_size": 96} if kind != Kind.F32 else changes
        model = tiny(family, **width)
        path = home / "tiny"
        if form == "folder":
            model.save_pretrained(path)
            gguf_words(model.config.vocab_size).save_pretrained(path)
        else:
            path = gguf_models.write(model, home / "tiny.gguf", kind)
        facts = prepare(str(path), home, cache / "models")
        slice_ = tiny(family, **width, num_hidden_layers=depth)
        return adapter_on(slice_, facts, depth, size, labels)

    return make


def gguf_words(size):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(size)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="2")


def outputs(adapter):
    prompts = check.prompts(adapter.facts.vocabulary)
    return prompts, check.trainer(adapter, prompts)


@pytest.mark.parametrize(("form", "depth"), [("folder", 4), ("folder", 3), ("gguf", 4), ("gguf", 3)])
def test_peft_loads_the_export_by_itself(saved, form, depth, tmp_path):
    adapter, out = saved(form=form, depth=depth, labels=("cold", "hot")), tmp_path / "out"
    forms.export("peft", adapter, out)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompts, truth = outputs(adapter)
    with model.disable_adapter():
        plain = check.logits(model, prompts)
    assert check.difference(Outputs(plain, check.logits(model, prompts)), truth) < (
        check.EXACT if form == "folder" else check.ROUNDED
    )
    assert model.config.num_hidden_layers == depth
    assert (out / "base").exists() == ((form, depth) != ("folder", 4))
    assert len(AutoTokenizer.from_pretrained(out)) and learned.read(out).labels == ("cold", "hot")
    assert [*tmp_path.iterdir()] == [out]
    if (out / "base").exists():
        whole = AutoModelForCausalLM.from_pretrained(out / "base", num_hidden_layers=depth)
        assert whole.dtype == (torch.float32 if form == "folder" else torch.bfloat16)


@pytest.mark.parametrize("depth", [4, 3])
def test_a_merged_folder_is_a_model_like_any_other(saved, depth, tmp_path):
    adapter, out = saved(depth=depth, labels=("cold",)), tmp_path / "out"
    forms.export("merged", adapter, out)
    prompts, truth = outputs(adapter)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert np.abs(check.logits(merged, prompts) - truth.adapted).max() < 1e-4 * np.abs(truth.adapted).max()
    assert (out / "label_head.safetensors").exists() and not (out / "adapter_config.json").exists()


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen2"])
def test_merging_follows_each_familys_layout(saved, family, tmp_path):
    adapter = saved(family)
    forms.export("merged", adapter, tmp_path / "out")
    prompts, truth = outputs(adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert np.abs(check.logits(merged, prompts) - truth.adapted).max() < 1e-3 * np.abs(truth.adapted).max()


@pytest.mark.parametrize(
    ("family", "depth"), [("llama", 4), ("llama", 3), ("phi3", 4), ("gemma", 4), ("gpt2", 4), ("phi", 4)]
)
def test_llama_cpp_computes_what_the_trainer_computes(saved, family, depth, tmp_path):
    adapter, out = saved(family, "gguf", depth), tmp_path / "out"
    forms.export("gguf", adapter, out)
    base = out / "base.gguf" if depth < 4 else Path(adapter.facts.weights)
    assert (out / "base.gguf").exists() == (depth < 4)
    prompts, truth = outputs(adapter)
    seen = tools.llama_cpp(base, out / "adapter.gguf", adapter.facts.vocabulary, prompts)
    assert check.difference(Outputs(*seen), truth) < CLOSE[family]


@pytest.mark.parametrize("depth", [4, 3])
def test_a_merged_gguf_file_keeps_the_adapter_in_float_and_loses_it_in_4_bits(saved, depth, tmp_path):
    adapter = saved("llama", "gguf", depth, Kind.Q4_0, size=0.015)
    with pytest.raises(InputError, match=r"the adapter is lost in weights of tiny.gguf's formats: \d+% of"):
        forms.export("merged-gguf", adapter, tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    forms.export("merged-gguf", adapter, tmp_path / "out", "f16")
    prompts, truth = outputs(adapter)
    (seen,) = tools.llama_cpp(tmp_path / "out" / "model.gguf", None, adapter.facts.vocabulary, prompts)
    assert check.difference(Outputs(truth.plain, seen), truth) < 0.5  # its activations have 8 bits


def test_a_gguf_file_of_the_base_serves_an_adapter_of_its_folder(saved, tiny, tmp_path):
    adapter = saved("llama")
    with pytest.raises(InputError, match=r"llama.cpp needs the base as a GGUF file.*give it with --base"):
        forms.export("gguf", adapter, tmp_path / "out")
    file = gguf_models.write(tiny("llama"), tmp_path / "base.gguf")
    facts = prepare(str(file), tmp_path, tmp_path / "cache")
    forms.export("gguf", base.on_other_file(adapter, facts), tmp_path / "out")
    other = prepare(str(gguf_models.write(tiny("llama", vocab_size=97), file)), tmp_path, tmp_path / "cache")
    with pytest.raises(InputError, match="32 values and 97 tokens"):
        base.on_other_file(adapter, other)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", Kind.Q8_0),
        ("llama", Kind.Q4_0),
        ("llama", Kind.BF16),
        ("gpt2", Kind.Q4_0),
        ("gemma", Kind.Q8_0),
        ("qwen2", Kind.F16),
    ],
)
def test_a_file_is_the_trained_base_within_its_formats_rounding(saved, tiny, family, kind, tmp_path):
    """Tied heads, interleaved and transposed rows, norms with an offset."""
    width = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    model, adapter = tiny(family, **width), saved(family, **width)
    facts = prepare(str(gguf_models.write(model, tmp_path / "base.gguf", kind)), tmp_path, tmp_path / "cache")
    found = base.on_other_file(adapter, facts)
    assert (found.facts.weights, found.facts.model_class) == (facts.weights, adapter.facts.model_class)


@pytest.mark.parametrize("fault", ["other", "norm", "layer", "row"])
def test_another_model_of_the_same_shapes_is_refused_by_the_name_of_its_tensor(saved, tiny, fault, tmp_path):
    width = {"hidden_size": 64, "intermediate_size": 96}
    adapter, model = saved("llama", **width), tiny("llama", **width)
    layers = model.model.layers
    if fault == "other":
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    elif fault == "norm":  # as after more training: less than 4 bits show of a matrix
        layers[2].input_layernorm.weight.mul_(1.01)
    elif fault == "layer":
        layers[1].load_state_dict(layers[2].state_dict())
    else:
        layers[3].mlp.down_proj.weight[0].mul_(-2)
    file = gguf_models.write(model, tmp_path / "base.gguf", Kind.Q4_0)
    facts = prepare(str(file), tmp_path, tmp_path / "cache")
    name = {"norm": "layers.2.input_layernorm", "layer": "layers.1.", "row": "layers.3.mlp.down_proj"}
    with pytest.raises(
        InputError,
        match=rf"model.{name.get(fault, 'embed_tokens')}.*is not that of tiny@.* differ by [\d.]+%, and rounding",
    ):
        base.on_other_file(adapter, facts)


def test_a_slice_whose_windows_llama_cpp_would_give_to_other_layers_is_refused(saved, tmp_path):
    adapter = saved("gemma2", "gguf", depth=3, head_dim=128, query_pre_attn_scalar=128)
    for form in ("gguf", "merged-gguf"):
        with pytest.raises(
            InputError, match=r"tells which layers have a sliding window .*export with --to peft"
        ):
            forms.export(form, adapter, tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    forms.export("merged", adapter, tmp_path / "out")


@pytest.mark.parametrize(("layers", "depth"), [(46, 4), (48, 46)])
def test_a_slice_whose_scores_llama_cpp_would_scale_otherwise_is_refused(tiny, layers, depth, tmp_path):
    """Of 46 layers, Gemma 2's largest model, llama.cpp takes hidden / heads in place of a head's width."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 8}
    model = tiny(
        "gemma2", **sizes, num_hidden_layers=layers, head_dim=128, query_pre_attn_scalar=128, vocab_size=96
    )
    facts = prepare(str(gguf_models.write(model, tmp_path / "m.gguf")), tmp_path, tmp_path / "cache")
    numbers = kept_layers(depth, layers)
    factor = np.zeros((1, 32), np.float32), np.zeros((512, 1), np.float32)
    adapter = learned.Learned(facts, numbers, {(layer, "q"): factor for layer in numbers}, 1, "")
    with pytest.raises(InputError, match=r"tells the scale of attention's scores .*query_pre_attn_scalar"):
        forms.export("gguf", adapter, tmp_path / "out")


def test_an_export_that_does_not_fit_is_refused_before_anything_is_written(saved, tmp_path, monkeypatch):
    """PEFT holds the whole base, and llama.cpp's check a block at a time."""
    adapter = saved("llama", "gguf")
    facts, profile = adapter.facts, edge_profiles.probe()
    free = 4 * (facts.head_parameters + 2 * facts.block_parameters)
    monkeypatch.setattr(
        edge_profiles, "probe", lambda: msgspec.structs.replace(profile, ram_available_bytes=free)
    )
    with pytest.raises(InputError, match=r"head and 4 layers of tiny@.* need .* in float32, but .* are free"):
        forms.export("peft", adapter, tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    forms.export("gguf", adapter, tmp_path / "out")


def test_what_cannot_be_exported_is_refused_by_name(saved, tmp_path):
    with pytest.raises(InputError, match="exists: give --out a folder that does not"):
        forms.export("peft", saved(), tmp_path)
    with pytest.raises(
        InputError, match="--weights is q4_0, but formats that --to merged-gguf takes are: f32, f16"
    ):
        forms.export("merged-gguf", saved(), tmp_path / "out", "q4_0")
    assert not [*tmp_path.iterdir()]


# --- wrong exports, each of which is seen


def unturned(rows, heads):
    return np.ascontiguousarray(rows)


def test_rows_in_a_wrong_order_are_seen_in_the_file_and_in_llama_cpps_logits(saved, tmp_path, monkeypatch):
    adapter = saved("llama", "gguf")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_adapter, "interleaved", unturned)
        with pytest.raises(EdgeError, match="does not hold what was learned; the files are removed"):
            forms.export("gguf", adapter, tmp_path / "out")
        gguf_adapter.write(adapter, tmp_path / "adapter.gguf")
    prompts, truth = outputs(adapter)
    base = Path(adapter.facts.weights)
    seen = tools.llama_cpp(base, tmp_path / "adapter.gguf", adapter.facts.vocabulary, prompts)
    assert check.difference(Outputs(*seen), truth) > 10 * CLOSE["llama"]
    assert [*tmp_path.iterdir()] == [tmp_path / "adapter.gguf"]


@pytest.mark.parametrize("fault", ["scale", "layer"])
@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_wrong_factor_is_seen_and_nothing_is_left(saved, form, fault, tmp_path, monkeypatch):
    adapter = saved()
    factors = {key: (A, 1.5 * B if fault == "scale" else B) for key, (A, B) in adapter.factors.items()}
    if fault == "layer":
        factors = {(layer, role): factors[3 - layer, role] for layer, role in factors}
    wrong = check.trainer(adapter._replace(factors=factors), check.prompts(adapter.facts.vocabulary))
    monkeypatch.setattr(check, "trainer", lambda *_: wrong)
    with pytest.raises(EdgeError, match=r"\d+(\.\d)?% of what "):
        forms.export(form, adapter, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_an_export_leaves_all_beside_it_alone(saved, tmp_path, monkeypatch):
    """Another export to the same place is whole, and so is a folder of the user's with a like name.

    What a killed export has left is removed.
    """
    adapter, merged, mine = saved(), forms.FORMS["merged"], tmp_path / "out.part" / "mine"
    for file in (mine, tmp_path / "out.killed.part" / MARK):
        file.parent.mkdir()
        file.touch()

    def overtaken(job):
        monkeypatch.setitem(forms.FORMS, "merged", merged)
        forms.export("merged", adapter, job.out)
        merged(job)

    monkeypatch.setitem(forms.FORMS, "merged", overtaken)
    with pytest.raises(OSError, match="not empty"):
        forms.export("merged", adapter, tmp_path / "out")
    assert {*tmp_path.iterdir()} == {tmp_path / "out", mine.parent}
    assert mine.exists()
    prompts, truth = outputs(adapter)
    assert np.allclose(tools.transformers(tmp_path / "out", prompts), truth.adapted, atol=1e-4)


def test_a_slice_comes_out_of_a_split_file_as_one(saved, tiny, tmp_path):
    adapter = saved("llama", "gguf", depth=3)
    gguf_models.write(tiny("llama"), tmp_path / "split.gguf", tensors_a_file=20)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 1
    for source, name in ((Path(adapter.facts.weights), "whole"), (parts[0], "parts")):
        gguf_model.write(adapter, source, tmp_path / f"{name}.gguf", merged=False)
    whole, split = (gguf_header.read(tmp_path / f"{name}.gguf") for name in ("whole", "parts"))
    assert split.metadata["llama.block_count"] == 3 and "split.count" not in split.metadata
    assert split.tensors.keys() == whole.tensors.keys()
    facts = prepare(str(tmp_path / "parts.gguf"), tmp_path, tmp_path / "cache")
    prompts, truth = outputs(adapter)
    assert np.allclose(check.logits(check.loaded(facts, 3), prompts), truth.plain, atol=1e-5)


def test_blocks_that_cannot_be_made_here_take_eight_bits_where_the_adapter_changes_them(tiny, tmp_path):
    model = tiny("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    base = gguf_models.write(model, tmp_path / "base.gguf", Kind.Q4_K)
    facts = prepare(str(base), tmp_path, tmp_path / "cache")
    forms.export("merged-gguf", adapter_on(model, facts, 2, 0.05), tmp_path / "out")
    kinds = {
        name: Kind(place.kind).name
        for name, place in gguf_header.read(tmp_path / "out" / "model.gguf").tensors.items()
    }
    assert (kinds["blk.1.ffn_up.weight"], kinds["token_embd.weight"]) == ("Q8_0", "Q4_K")


def test_the_page_s_lines_give_the_label_that_the_trainer_s_head_gives(saved, tmp_path, monkeypatch):
    adapter = saved(labels=("cold", "hot", "warm"))
    forms.export("peft", adapter, tmp_path / "use" / "peft")
    page = (Path(__file__).parents[3] / "docs" / "use.md").read_text(encoding="utf-8")
    code, lines = {}, page.split('```python title="use_head.py"\n')[1].partition("```")[0]
    exec(compile(lines, "use.md", "exec"), code)
    monkeypatch.chdir(tmp_path)
    model = peft.AutoPeftModelForCausalLM.from_pretrained("use/peft", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("use/peft")
    trained = check.loaded(adapter.facts, 4)
    attach.put_on(trained, adapter)
    seen = set()
    for text in ("3 4 5", "90 7", "11 12 13 14", "20", "33 50 60"):
        row = Example(tokenizer(text)["input_ids"], [])
        states = label_states([row], hidden_states(trained, [row])[0])
        label = adapter.labels[(torch.from_numpy(adapter.head) @ states[0]).argmax()]
        assert code["label"](model, tokenizer, text) == label
        seen.add(label)
    assert len(seen) > 1
