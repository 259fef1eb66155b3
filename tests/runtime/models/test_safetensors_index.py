"""A folder's tensors are found under the names that transformers reads, and all are accounted for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from benchmarks.models import save_folder
from edge_runtime.errors import InputError
from edge_runtime.models import weights
from edge_runtime.models.prepare import prepare

IDS = torch.arange(3, 43).reshape(2, 20)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,  # as many as the text model has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def saved(tmp_path):
    """saved(model): a folder of the model, with a tokenizer."""
    return lambda model: save_folder(model, tmp_path / "model")


def change(folder, edit):
    """Edit the tensors of a folder, a dict by name."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: held.contiguous().clone() for name, held in tensors.items()}, folder / "model.safetensors"
    )


def loaded(folder):
    facts = prepare(str(folder), folder, folder.parent / "cache")
    return facts, weights.load(facts, facts.layers, "float32")


@torch.no_grad()
def is_transformers(folder):
    """Whether our logits are those of transformers, which loads the same folder."""
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.equal(loaded(folder)[1](IDS).logits, truth(IDS).logits)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_model_saved_without_its_head_is_read(tiny, saved, family):
    model = tiny(family, tie_word_embeddings=True)
    folder = saved(model.base_model)
    assert not any(
        name.startswith(model.base_model_prefix) for name in load_file(folder / "model.safetensors")
    )
    assert is_transformers(folder)


def test_gpt2s_masks_are_without_effect(tiny, saved):
    folder = saved(tiny("gpt2").transformer)
    masks = {
        f"h.{n}.attn.{name}": torch.ones(1, 1, 64, 64) for n in range(4) for name in ("bias", "masked_bias")
    }
    change(folder, lambda tensors: tensors.update(masks))
    assert is_transformers(folder)


def test_old_rotary_frequencies_are_without_effect(tiny, saved):
    folder = saved(tiny("llama"))
    change(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    assert is_transformers(folder)


def test_the_text_part_of_a_model_that_reads_images_is_read(tiny, saved):
    text = tiny(
        "gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6
    ).config
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4, eos_token_id=[1, 7]
    )
    folder = saved(Gemma3ForConditionalGeneration(config))
    assert any("vision" in name for name in load_file(folder / "model.safetensors"))
    assert is_transformers(folder)
    facts, model = loaded(folder)
    assert (facts.family, facts.layers, facts.tied_head) == ("gemma3_text", 4, True)
    assert not any("vision" in name for name, _ in model.named_modules())
    assert model.config.eos_token_id == [1, 7]  # the wrapper's
    change(folder, lambda tensors: tensors.update({"language_model.model.layers.9.x": torch.ones(2)}))
    with pytest.raises(InputError, match=r"no place in .* such as language_model\.model\.layers\.9\.x"):
        loaded(folder)


def test_a_tied_head_may_be_in_the_files_too(tiny, saved):
    folder = saved(tiny("llama", tie_word_embeddings=True))
    change(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"]}))
    facts, _ = loaded(folder)
    assert facts.tied_head and is_transformers(folder)


def test_a_head_said_to_be_tied_that_differs_in_the_files_is_untied(tiny, saved):
    folder = saved(tiny("llama", tie_word_embeddings=True))
    change(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + 1}))
    facts, model = loaded(folder)
    assert not facts.tied_head and is_transformers(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_a_tied_embedding_may_be_in_the_files_as_the_head(tiny, saved):
    folder = saved(tiny("llama", tie_word_embeddings=True))
    change(folder, lambda held: held.update({"lm_head.weight": held.pop("model.embed_tokens.weight")}))
    assert is_transformers(folder)


def test_every_other_tensor_is_refused_by_name(tiny, saved):
    folder = saved(tiny("llama"))
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64), "lm_head.bias": torch.ones(96)}
    change(folder, lambda held: held.update(extra))
    with pytest.raises(
        InputError, match=r"has 2 tensors that have no place in the model .* such as lm_head\.bias"
    ):
        loaded(folder)


def test_a_missing_tensor_is_named_before_anything_is_written(tiny, saved):
    folder = saved(tiny("llama"))
    change(folder, lambda held: held.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(
        InputError, match=r"lacks the tensor model\.layers\.3\.mlp\.up_proj\.weight, which the"
    ):
        loaded(folder)
    assert [path.name for path in (folder.parent / "cache").iterdir() if path.is_dir()] == ["digests"]


def test_an_untied_head_that_is_missing_is_refused(tiny, saved):
    folder = saved(tiny("llama", tie_word_embeddings=False))
    change(folder, lambda held: held.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lacks the tensor lm_head\.weight"):
        loaded(folder)


def test_a_tensor_under_two_of_its_names_is_refused(tiny, saved):
    folder = saved(tiny("llama"))
    change(folder, lambda held: held.update({"norm.weight": held["model.norm.weight"] + 1}))
    with pytest.raises(InputError, match=r"has the tensor model\.norm\.weight twice"):
        loaded(folder)


def test_a_tensor_of_another_size_is_refused_with_both(tiny, saved):
    folder = saved(tiny("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 97}))
    with pytest.raises(InputError, match=r"embed_tokens.weight is \(96, 32\) in .* needs \(97, 32\)"):
        loaded(folder)
