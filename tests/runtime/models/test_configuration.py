"""Keys of config.json that a model would leave out are refused; keys of published models are not."""

import json

import pytest
from transformers import AutoConfig

from edge_runtime.errors import InputError
from edge_runtime.models import configuration


@pytest.fixture
def with_keys(tiny, tmp_path):
    """with_keys(**keys): the text model's configuration of a folder whose config.json has these keys too."""

    def read(**keys):
        tiny("llama").config.save_pretrained(tmp_path)
        stated = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**stated, **keys}))
        return configuration.text_part(tmp_path, AutoConfig.from_pretrained(tmp_path))

    return read


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
    assert with_keys(**keys).model_type == "llama"


@pytest.mark.parametrize("keys", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_model_whose_tokens_see_later_ones_is_refused(with_keys, keys):
    with pytest.raises(
        InputError, match=r"lets each token see those after it|sets use_bidirectional_attention"
    ):
        with_keys(**keys)


def test_a_name_that_the_model_does_not_read_does_not_reach_the_operators(with_keys):
    assert not hasattr(with_keys(hidden_activation="gelu"), "hidden_activation")
