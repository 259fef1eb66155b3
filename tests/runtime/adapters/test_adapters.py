"""The adapter on tiny random models of every family: roles, attaching, state, and the same model in PEFT's hands."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from family_cases import CASES

from edge_runtime import settings
from edge_runtime.adapters import attach
from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.errors import InputError
from edge_runtime.methods import fedit, fedsb
from edge_runtime.methods.interface import A, B
from edge_runtime.models.slices import kept_layers

FEDIT = fedit.METHOD
LAYERS = (0, 1, 2, 3)
SPEC = settings.Adapter(rank=3, alpha=12.0)
IDS = torch.arange(24).reshape(2, 12) % 96

each_family = pytest.mark.parametrize("family", CASES)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def difference(one, two):
    """The largest difference of two outputs, relative to the largest value."""
    return float((one - two).abs().max() / two.abs().max())


def random_state(adapter):
    draw = np.random.default_rng(0)
    return {
        key: draw.normal(0, 0.3, value.shape).astype(np.float32)
        for key, value in sorted(attach.state(adapter).items())
    }


@each_family
def test_attaching_leaves_the_logits_as_they_were(tiny, family):
    model = tiny(family)
    before = logits(model)
    adapter = attach.attach(model, LAYERS, SPEC, FEDIT, seed=0)
    assert difference(logits(model), before) < 1e-6
    attach.load_state(adapter, random_state(adapter))
    assert difference(logits(model), before) > 1e-2


@each_family
def test_every_factor_and_nothing_else_gets_a_gradient(tiny, family):
    model = tiny(family)
    adapter = attach.attach(model, LAYERS, SPEC, FEDIT, seed=0)
    attach.load_state(adapter, random_state(adapter))
    model(IDS, labels=IDS).loss.backward()
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in adapter.factors.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(adapter.factors) == 2 * len(LAYERS) * len(CASES[family].linears)


@each_family
@pytest.mark.parametrize("depth", [4, 3])
def test_shapes_are_known_without_the_model(tiny, facts_of, family, depth):
    """The planner and the node count on it."""
    model = tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": depth})
    layers = kept_layers(depth, 4)
    adapter = attach.attach(model, layers, SPEC, FEDIT, seed=0)
    shapes = {key: value.shape for key, value in attach.state(adapter).items()}
    assert shapes == adapter_shapes(facts_of(tiny(family)), layers, SPEC.roles, SPEC.rank, FEDIT)


@each_family
def test_a_state_taken_out_and_put_back_is_the_same_model(tiny, family):
    first, second = tiny(family), tiny(family)
    adapter = attach.attach(first, LAYERS, SPEC, FEDIT, seed=0)
    attach.load_state(adapter, random_state(adapter))
    taken = attach.state(adapter)
    attach.load_state(attach.attach(second, LAYERS, SPEC, FEDIT, seed=1), taken)
    assert torch.equal(logits(first), logits(second))
    taken["layers.0.o.A"] += 1  # a copy: the model does not follow it
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.2.q.A"), "lacks layers.2.q.A"),
        (
            lambda state: state.update({"layers.9.q.A": state["layers.2.q.A"]}),
            "has layers.9.q.A, which this adapter",
        ),
        (
            lambda state: state.update({"layers.2.q.A": state["layers.2.q.A"][:2]}),
            r"layers.2.q.A is \(2, 32\) in the adapter state, but has to be \(3, 32\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(tiny, change, message):
    adapter = attach.attach(tiny("llama"), LAYERS, SPEC, FEDIT, seed=0)
    before, wrong = attach.state(adapter), random_state(adapter)
    change(wrong)
    with pytest.raises(InputError, match=message):
        attach.load_state(adapter, wrong)
    assert all(np.array_equal(before[key], value) for key, value in attach.state(adapter).items())


def test_only_the_wanted_roles_are_adapted(tiny):
    adapter = attach.attach(
        tiny("llama"), LAYERS, settings.Adapter(rank=2, roles=("q", "down")), FEDIT, seed=0
    )
    assert {key.split(".")[2] for key in adapter.factors} == {"q", "down"}
    with pytest.raises(InputError, match="no linear layer of the roles fc1, fc2"):
        attach.attach(tiny("llama"), LAYERS, settings.Adapter(roles=("fc1", "fc2")), FEDIT, seed=0)


def test_an_unknown_family_is_refused_by_name(tiny):
    model = tiny("llama")
    model.config.model_type = "mamba"
    with pytest.raises(InputError, match="models of type mamba are not supported; known: llama, mistral"):
        attach.attach(model, LAYERS, SPEC, FEDIT, seed=0)


# --- the start values


def test_the_start_is_equal_in_every_process_and_version():
    """Devices and node never send it to each other, so a numpy that draws other numbers has to be seen here."""
    code = (
        "from edge_runtime.adapters.initial import initial; from edge_runtime.methods.interface import A; import hashlib;"
        "print(hashlib.sha256(initial('layers.3.q.A', (4, 64), 7, A).tobytes()).hexdigest()[:16])"
    )
    printed = {subprocess.check_output([sys.executable, "-c", code], text=True).strip() for _ in range(2)}
    assert printed == {"368a476735aa3fa8"}


def test_the_start_depends_on_key_and_seed():
    one = initial("layers.3.q.A", (4, 64), 7, A)
    assert np.array_equal(one, initial("layers.3.q.A", (4, 64), 7, A))
    assert not np.array_equal(one, initial("layers.4.q.A", (4, 64), 7, A))
    assert not np.array_equal(one, initial("layers.3.q.A", (4, 64), 8, A))


def test_the_start_is_even_over_the_layers_width_or_zero():
    wide = initial("layers.0.q.A", (64, 400), 0, A)
    assert wide.dtype == np.float32
    assert np.abs(wide).max() <= 1 / 20
    assert abs(wide.std() - 1 / 20 / 3**0.5) < 1e-3
    high = initial("layers.0.q.B", (400, 64), 0, fedsb.METHOD.factors["B"])
    assert np.abs(high).max() <= 1 / 20 < 1.01 * np.abs(high).max()
    assert not initial("layers.0.q.B", (400, 64), 0, B).any()


def test_frozen_factors_have_no_gradient_and_version_0_changes_nothing(tiny):
    model, plain = tiny("llama"), logits(tiny("llama"))
    adapter = attach.attach(model, LAYERS, SPEC, fedsb.METHOD, seed=0)
    assert difference(plain, logits(model)) < 1e-6
    model(IDS, labels=IDS).loss.backward()
    assert {key[-1] for key, factor in adapter.factors.items() if factor.grad is not None} == {"C"}
    assert all(factor.grad.any() for key, factor in adapter.factors.items() if key.endswith("C"))
