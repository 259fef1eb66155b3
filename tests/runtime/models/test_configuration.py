"""Keys of config.json that a model would leave out are refused; keys of published models are not."""

import json
import shutil

import pytest

from edge_runtime.errors import InputError
from edge_runtime.models.prepare import prepare


@pytest.fixture
def with_keys(tiny_folder, tmp_path):
    def make(**keys):
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))
        return prepare(str(folder), tmp_path, tmp_path / "cache")

    return make


@pytest.mark.parametrize(
    "keys",
    [
        {"logit_scale": 0.5},
        {"rope_interleaved": True},
        {"final_logit_softcapping": 30.0},
        {"residual_multiplier": 0.22},
        {"sliding_window": 6},
        {"num_local_experts": 8},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"no_rope_layers": [1, 0, 1, 0]},
    ],
)
def test_a_key_that_the_model_leaves_out_is_refused_by_name(with_keys, keys):
    with pytest.raises(
        InputError, match=rf"sets {next(iter(keys))} to .*, which transformers' llama leaves out"
    ):
        with_keys(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        # of published checkpoints
        {"pretraining_tp": 1, "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {
            "_name_or_path": "x",
            "unsloth_version": "2026.1",
            "unsloth_fixed": True,
            "cache_implementation": "hybrid",
        },
        {"max_sequence_length": 2048, "image_token_index": 5, "lm_head_bias": False, "full_attn_mod": 1},
        {
            "task_specific_params": {"text-generation": {"max_length": 50}},
            "temperature": 0.6,
            "_attn_mode": 3,
        },
    ],
)
def test_keys_without_effect_are_passed_over(with_keys, keys):
    assert with_keys(**keys).family == "llama"


@pytest.mark.parametrize("keys", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_model_whose_tokens_see_later_ones_is_refused(with_keys, keys):
    with pytest.raises(
        InputError, match=r"lets each token see those after it|sets use_bidirectional_attention"
    ):
        with_keys(**keys)


def test_a_name_that_the_model_does_not_read_does_not_reach_the_operators(with_keys):
    from pathlib import Path

    facts = with_keys(hidden_activation="gelu")
    assert "gelu" not in (Path(facts.folder) / "config.json").read_text()
