"""Each key and tensor of a GGUF file is read, known to change nothing, or refused by name."""

import math

import pytest
import torch

from benchmarks import gguf_models, model_cases
from edge_runtime.compat.empty_model import empty_model
from edge_runtime.errors import InputError
from edge_runtime.models import gguf_config, gguf_header, gguf_keys
from edge_runtime.models.prepare import prepare


@pytest.fixture
def contents_of(tmp_path):
    """contents_of(family, variant, **keys): what a file's headers say, with some keys changed; None: missing."""

    def read(family, variant="tied", **keys):
        path = gguf_models.write(model_cases.build(family, variant), tmp_path / "model.gguf")
        contents = gguf_header.read(path)
        architecture = contents.metadata["general.architecture"]
        changed = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
        metadata = {**contents.metadata, **changed}
        return contents._replace(
            metadata={key: value for key, value in metadata.items() if value is not None}
        )

    return read


def test_a_key_that_is_not_known_is_refused_by_name(contents_of):
    with pytest.raises(
        InputError, match=r"model\.gguf has llama\.embedding_scale = 12\.0, but what this key"
    ):
        gguf_config.configuration(contents_of("llama", embedding_scale=12.0))


@pytest.mark.parametrize(
    ("family", "key", "value", "reason"),
    [
        ("llama", "expert_count", 8, "only 0 is supported"),
        ("llama", "attention__causal", False, "only True is supported"),
        ("llama", "attention__sliding_window", 6, "has no windows"),
        ("llama", "attention__value_length", 8, "as wide as keys"),
        ("llama", "attention__head_count_kv", (4, 2), "all layers have to be equal"),
        ("llama", "attention__head_count", 0, "a whole number, 1 or more, is needed"),
        ("llama", "attention__head_count", "4", "a whole number, 1 or more, is needed"),
        ("llama", "attention__head_count_kv", 0, "a whole number, 1 or more, is needed"),
        ("llama", "embedding_length", 0, "a whole number, 1 or more, is needed"),
        ("llama", "block_count", 4.0, "a whole number, 1 or more, is needed"),
        ("llama", "block_count", 2**31, r"the file has \d+ tensors"),
        ("llama", "block_count", -1, "a whole number, 1 or more, is needed"),
        ("llama", "context_length", 0, "a whole number, 1 or more, is needed"),
        ("llama", "embedding_length", 2**31, r"the longest side of the file's tensors is \d+"),
        ("llama", "embedding_length", 48, r"token_embd.weight is \("),
        ("llama", "feed_forward_length", 10**12, r"the longest side of the file's tensors is \d+"),
        ("llama", "attention__head_count", 2**31, r"the longest side of the file's tensors is \d+"),
        ("llama", "attention__key_length", 2**40, r"the longest side of the file's tensors is \d+"),
        ("phi", "rope__dimension_count", 80, "a head has 64 values"),
        ("llama", "rope__dimension_count", 0, "a whole number, 1 or more, is needed"),
        ("llama", "rope__dimension_count", 8, "whole width, 16"),
        ("llama", "rope__scaling__type", "dynamic", "known .* none, linear, yarn"),
        ("llama", "rope__scaling__attn_factor", 1.2, "only 1 is supported"),
        ("qwen3", "rope__scaling__type", "longrope", "known .* none, linear, yarn"),
        ("gemma2", "attention__key_length", 64, r"known for widths \(128, 256\) alone"),
        ("gemma3_text", "attn_logit_softcapping", 50.0, "only 0.0 is supported"),
    ],
)
def test_a_value_that_is_not_computed_here_is_refused_by_name(contents_of, family, key, value, reason):
    changes = (
        {key: value, "attention__value_length": value} if key == "attention__key_length" else {key: value}
    )
    with pytest.raises(InputError, match=f"{key.replace('__', '.')} = .*{reason}"):
        gguf_config.configuration(contents_of(family, **changes))


def test_keys_without_effect_change_nothing(contents_of):
    plain = gguf_config.configuration(contents_of("llama")).to_dict()
    values = {key: 7 if value is None else value for key, value in gguf_keys.NEUTRAL.items()}
    more = {key.replace(".", "__"): value for key, value in values.items()}
    assert gguf_config.configuration(contents_of("llama", **more)).to_dict() == plain
    assert gguf_config.configuration(contents_of("llama", rope__freq_base=9.0)).to_dict() != plain


@pytest.mark.parametrize("key", ["context_length", "block_count", "attention.head_count"])
def test_a_key_that_is_missing_is_named(contents_of, key):
    with pytest.raises(InputError, match=rf"model\.gguf lacks the key llama\.{key}"):
        gguf_config.configuration(contents_of("llama", **{key.replace(".", "__"): None}))


@pytest.mark.parametrize("key", ["original_context_length", "attn_factor"])
def test_divisors_without_the_keys_that_say_how_they_are_used_are_refused(contents_of, key):
    with pytest.raises(InputError, match=rf"lacks the key phi3\.rope\.scaling\.{key}"):
        gguf_config.configuration(contents_of("phi3", "rope longrope", **{f"rope__scaling__{key}": None}))


def test_yarn_for_a_class_that_does_not_have_it_is_refused(contents_of):
    scaled = contents_of("phi3", rope__scaling__type="yarn", rope__scaling__factor=4.0)
    with pytest.raises(InputError, match="no sound configuration"):
        gguf_config.configuration(scaled)


def test_a_tensor_that_has_no_place_or_is_missing_or_of_another_shape_is_named(tmp_path):
    model = model_cases.build("llama", "tied")
    path = tmp_path / "model.gguf"
    known = dict(model.state_dict())
    places = {
        "blk.0.ffn_gate.scale": (torch.ones(1), "blk.0.ffn_gate.scale"),
        "model.layers.1.mlp.up_proj.weight": (None, "lacks the tensor blk.1.ffn_up.weight"),
        "model.norm.weight": (
            torch.ones(255),
            r"output_norm.weight is \(255,\), but this model needs \(256,\)",
        ),
    }
    for name, (value, reason) in places.items():
        state = {**known, name: value}
        model.state_dict = lambda state=state: {key: held for key, held in state.items() if held is not None}
        gguf_models.write(model, path)
        with pytest.raises(InputError, match=reason):
            prepare(str(path), tmp_path, tmp_path / "cache")


def test_windows_have_the_period_of_the_file_or_of_the_family(contents_of):
    kinds = lambda contents: "".join(kind[0] for kind in gguf_config.configuration(contents).layer_types)  # noqa: E731
    window = {"attention__sliding_window": 6, "block_count": 7}
    assert kinds(contents_of("gemma2", **window)) == "sfsfsfs"
    pattern = "attention__sliding_window_pattern"
    assert kinds(contents_of("gemma3_text", **window, **{pattern: None})) == "sssssfs"
    assert kinds(contents_of("gemma3_text", **window, **{pattern: 3})) == "ssfssfs"
    assert kinds(contents_of("gemma3_text", **window, **{pattern: (True, False) * 4})) == "sfsfsfs"
    none = {"attention__sliding_window": 0, pattern: None}
    assert kinds(contents_of("gemma3_text", **{**window, **none})) == "fffffff"


def test_attention_is_scaled_by_a_heads_width_but_in_the_largest_model(contents_of):
    def scale(contents):
        tensors = {f"blk.{n}.{name}": place for n in range(3) for name, place in contents.tensors.items()}
        contents = contents._replace(tensors=contents.tensors | tensors)  # as many as of so many layers
        return gguf_config.configuration(contents).query_pre_attn_scalar

    assert scale(contents_of("gemma2")) == 128
    assert scale(contents_of("gemma2", block_count=46)) == 256 // 4
    assert scale(contents_of("gemma3_text", block_count=62, attention__sliding_window_pattern=6)) == 256 // 4


@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("rope linear", {}),
        ("rope yarn", {}),
        ("rope yarn", {"rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__yarn_attn_factor": 1.5}),
        ("rope yarn", {"rope__scaling__attn_factor": 0.5}),
        ("rope llama3", {}),
        ("rope llama3", {"rope__scaling__factor": 2.0}),
        ("tied", {"rope__freq_base": 500000.0, "rope__scale_linear": 3.0}),
        ("tied", {"rope__scaling__type": "none", "rope__scaling__factor": 3.0}),
    ],
)
def test_rotary_frequencies_are_those_of_the_definition(contents_of, variant, keys):
    contents = contents_of("llama", variant, **keys)
    rotary = empty_model(gguf_config.configuration(contents)).model.rotary_emb
    frequencies, attention = definition(contents)
    assert torch.allclose(rotary.inv_freq.double(), frequencies, rtol=1e-6)
    assert math.isclose(rotary.attention_scaling, attention, rel_tol=1e-6)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).double() / 16)
    assert torch.allclose(rotary.inv_freq.double(), plain, rtol=1e-2) == (
        keys.get("rope__scaling__type") == "none"
    )


def definition(contents):
    """Frequencies in float64 by llama.cpp's definition, and the factor of cosine and sine."""
    keys = {key.partition(".")[2]: value for key, value in contents.metadata.items()}
    width, base = keys["attention.key_length"], keys["rope.freq_base"]
    exact = float(base) ** -(torch.arange(0, width, 2).double() / width)
    kind = keys.get("rope.scaling.type", "linear")
    scale = 1.0 / (keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0)
    if place := contents.tensors.get("rope_freqs.weight"):
        with contents.files[0].open("rb") as stream:
            stream.seek(place.first)
            exact /= torch.frombuffer(bytearray(stream.read(place.end - place.first)), dtype=torch.float32)
    if kind == "none":
        return exact, 1.0
    if kind == "linear":
        return exact * scale, keys.get("rope.scaling.attn_factor", 1.0)
    context = keys["rope.scaling.original_context_length"]
    turns = lambda beta: width * math.log(context / (beta * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
    low = max(math.floor(turns(keys.get("rope.scaling.yarn_beta_fast", 32.0))), 0)
    high = min(math.ceil(turns(keys.get("rope.scaling.yarn_beta_slow", 1.0))), width - 1)
    kept = 1 - ((torch.arange(width // 2).double() - low) / max(0.001, high - low)).clamp(0, 1)
    attention = keys.get("rope.scaling.yarn_attn_factor", 1 - 0.1 * math.log(scale))
    return exact * (scale * (1 - kept) + kept), attention * keys.get("rope.scaling.attn_factor", 1.0)
