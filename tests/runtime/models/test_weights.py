"""Base models and their slices are loaded as they were saved."""

import json

import pytest
import torch
from family_cases import CASES
from safetensors.torch import load_file, save_file

from edge_runtime.errors import InputError
from edge_runtime.models import structure, weights

IDS = torch.arange(3, 43).reshape(2, 20)


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


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_every_family_is_loaded_as_it_was_saved(tiny, facts_of, family, shard, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = weights.load(facts_of(model, folder=str(tmp_path), weights=str(tmp_path)), 4, "float32")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_blocks_that_are_read_while_they_run_compute_the_same_and_take_no_memory_else(
    tiny, facts_of, family, tmp_path
):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    loaded = weights.load(
        facts_of(model, folder=str(tmp_path), weights=str(tmp_path)), 4, "float32", streamed=True
    )
    blocks = structure.blocks(loaded)
    most = []  # blocks in memory after each block began
    for block in blocks:
        norm = next(module for module in block.modules() if "Norm" in type(module).__name__)
        norm.register_forward_pre_hook(lambda *_: most.append(sum(map(bytes_of, blocks))))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    whole = sum(p.numel() * 4 for p in blocks[0].parameters())
    assert len(most) == 8 and whole <= min(most) <= max(most) < 1.2 * whole
    assert sum(map(bytes_of, blocks)) < 0.1 * whole


def bytes_of(block):
    return sum(parameter.untyped_storage().nbytes() for parameter in block.parameters())


@pytest.mark.parametrize("family", CASES)
def test_a_slice_of_every_family_is_the_model_without_its_middle(tiny, facts_of, family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    loaded = weights.load(facts_of(model, folder=str(tmp_path), weights=str(tmp_path)), 2, "float32")
    for seen, kept in zip(structure.blocks(loaded), (0, 3), strict=True):
        truth = structure.blocks(model)[kept].state_dict()
        assert seen.state_dict().keys() == truth.keys()
        assert all(torch.equal(value, truth[name]) for name, value in seen.state_dict().items())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_a_tensor_that_went_missing_after_preparing_is_named(tiny, facts_of, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    facts = facts_of(model, folder=str(tmp_path), weights=str(tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the tensor model\.layers\.3\.mlp\.up_proj\.weight"):
        weights.load(facts, 4, "float32")
    weights.load(facts, 1, "float32")  # a slice that does not need it


def test_a_tensor_that_got_another_size_after_preparing_is_refused_by_name(tiny, facts_of, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    facts = facts_of(model, folder=str(tmp_path), weights=str(tmp_path))
    tiny("llama", vocab_size=97).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 96}))
    message = r"embed_tokens.weight is \(97, 32\) in .*, but this model needs \(96, 32\)"
    with pytest.raises(InputError, match=message):
        weights.load(facts, 4, "float32")


def test_a_slice_is_refused_where_attention_depends_on_a_layers_number(tiny, facts_of, tmp_path):
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    model.save_pretrained(tmp_path)
    facts = facts_of(model, folder=str(tmp_path), weights=str(tmp_path))
    with pytest.raises(InputError, match="depends on a layer's number"):
        weights.load(facts, 2, "float32")
    assert torch.equal(weights.load(facts, 4, "float32")(IDS).logits, model(IDS).logits)
