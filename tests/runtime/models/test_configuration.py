"""Keys of config.json that a model would leave out are refused; keys of published models are not."""

import json

import pytest
from transformers import AutoConfig

from edge_runtime.errors import InputError
from edge_runtime.models import configuration


@pytest.fixture
def with_keys(tiny, tmp_path):
    """with_keys(family="llama", **keys): the text model's configuration of a folder whose config.json has these keys too."""

    def read(family="llama", **keys):
        tiny(family).config.save_pretrained(tmp_path)
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
        {"norm_type": "layernorm"},
        {"position_embedding_type": "alibi"},
        {"qk_norm": "rms"},
        {"hidden_activation": "gelu"},
        {"mlpType": "plain"},
    ],
)
def test_a_key_that_the_model_leaves_out_is_refused_by_name(with_keys, keys):
    with pytest.raises(
        InputError, match=rf"sets {next(iter(keys))} to .*, which transformers' llama leaves out"
    ):
        with_keys(**keys)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"sliding_window_size": 4096}),
        ("llama", {"sliding_window_pattern": 3}),
        ("gemma2", {"sliding_window_pattern": 3}),
        ("gpt2", {"head_dim": 8}),
        ("phi", {"rotary_dim": 4}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
    ],
)
def test_a_key_that_only_other_families_read_is_refused_by_name(with_keys, family, keys):
    with pytest.raises(InputError, match=rf"sets {next(iter(keys))} to .*' {family} leaves out"):
        with_keys(family, **keys)


LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("llama", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor to 0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor to 0.5"),
        ("gemma3_text", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor to 0.5"),
        ("llama", {"rope_parameters": {**LINEAR, "beta_fast": 4}}, "beta_fast to 4"),
        ("qwen2", {"rope_parameters": {"mrope_section": [16, 24, 24]}}, "mrope_section to"),
        ("mistral", {"rope_parameters": {**LINEAR, "low_freq_factor": 4}}, "low_freq_factor to 4"),
        ("gemma3_text", {"rope_parameters": LINEAR}, "rope_type to linear"),  # of neither kind of layer
        ("gemma3_text", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8}}, "type to linear"),
        ("llama", {"rope_theta": 500.0}, "sets rope_theta to 500.0"),  # another is in rope_parameters
        ("phi", {"partial_rotary_factor": 0.25}, "sets partial_rotary_factor to 0.25"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_scaling beside rope_parameters"),
    ],
)  # fmt: skip
def test_a_rotary_key_that_is_not_read_is_refused_by_name(with_keys, family, keys, named):
    with pytest.raises(InputError, match=rf"{named}.*, which transformers' {family} leaves out"):
        with_keys(family, **keys)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0, "finetuned": True}}),
        ("phi", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
        ("llama", {"rope_parameters": {"type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": 1}}),
        ("gemma3_text", {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 8}}),
    ],
)
def test_a_rotary_key_that_is_read_is_passed(with_keys, family, keys):
    assert with_keys(family, **keys).model_type == family


@pytest.mark.parametrize(
    "keys",
    [
        # of published checkpoints
        {"pretraining_tp": 1, "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {
            "_name_or_path": "x",
            "properties": "a note",
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


PUBLISHED = {  # keys of config.json on the hub, without those that every configuration has
    "gpt2": {
        "n_ctx": 1024,
        "n_positions": 1024,
        "summary_use_proj": True,
        "task_specific_params": {"x": {"y": 1}},
    },
    "gemma3_text": {
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
        "_sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
        "query_pre_attn_scalar": 256,
    },
    "gemma2": {
        "hidden_act": "gelu_pytorch_tanh",
        "cache_implementation": "hybrid",
        "sliding_window_size": 4096,
    },
    "gemma": {"hidden_activation": None, "rope_theta": 10000.0, "hidden_act": "gelu"},
    "llama": {
        "pretraining_tp": 1,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "max_sequence_length": 2048,
    },
    "mistral": {"sliding_window": None, "rope_theta": 1000000.0, "head_dim": 128},
    "phi": {"partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_scaling": None, "rope_theta": 10000.0},
    "phi3": {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "embd_pdrop": 0.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
    },
    "qwen2": {
        "max_window_layers": 21,
        "use_mrope": False,
        "use_sliding_window": False,
        "dual_chunk_attention_config": {"chunk_size": 262144},
        "head_dim": 16,
    },
    "qwen3": {"max_window_layers": 28, "use_sliding_window": False, "rope_theta": 1000000, "head_dim": 128},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_keys_of_published_checkpoints_are_passed(family, tmp_path):
    stated = {
        "model_type": family,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0",
        **PUBLISHED[family],
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    text = configuration.text_part(tmp_path, AutoConfig.from_pretrained(tmp_path))
    assert text.model_type == family and not hasattr(text, "auto_map")


@pytest.mark.parametrize("keys", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_model_whose_tokens_see_later_ones_is_refused(with_keys, keys):
    with pytest.raises(
        InputError, match=r"lets each token see those after it|sets use_bidirectional_attention"
    ):
        with_keys(**keys)


def test_windows_without_a_width_are_refused(with_keys):
    kinds = ["sliding_attention", "full_attention"]
    layers = {"layer_types": kinds, "num_hidden_layers": 2}
    with pytest.raises(InputError, match="but no width in sliding_window"):
        with_keys("qwen2", **layers, use_sliding_window=False)
    with_keys("qwen2", **layers, use_sliding_window=True, sliding_window=4, max_window_layers=1)


def test_how_a_model_was_run_is_not_how_it_is_run(with_keys):
    run = {
        "attn_implementation": "flash_attention_2",
        "_attn_implementation_internal": "eager",
        "return_dict": False,
    }
    text = with_keys(**run, output_hidden_states=True)
    assert text._attn_implementation is None and text.return_dict and not text.output_hidden_states


def test_another_file_of_weights_is_refused(with_keys):
    with pytest.raises(InputError, match=r"\(transformers_weights\), which is not read"):
        with_keys(transformers_weights="other.safetensors")


def test_a_note_does_not_reach_the_operators(with_keys):
    assert not hasattr(with_keys(made_by="me"), "made_by")
