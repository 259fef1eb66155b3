"""heterotune's branches beside the LoRA and CMGA's steps, against their equations in float64."""

import numpy as np
import pytest
import torch
from test_adapters import IDS, LAYERS, difference, logits, random_state

from edge_runtime import methods, settings
from edge_runtime.adapters import attach, learned
from edge_runtime.errors import InputError
from edge_runtime.methods import fedadapter, fedit, heterotune
from edge_runtime.methods.interface import Contribution

SPEC = settings.Adapter(rank=4, alpha=12.0)
LINEAR = heterotune.HeteroTune(rank=3, stages=2).method()
MIXTURE = heterotune.HeteroTune(form="mixture", rank=3, branches=2, width=5, stages=2).method()
KEY = "stages.0.q.C"


def sent(model_class, step, samples=10, key=KEY):
    value = np.asarray(step, np.float32).reshape(4, 4)
    return Contribution({key: np.zeros_like(value)}, {key: value}, samples, model_class)


def merged(devices, alignment="leave-one-out", *, summed=False):
    return heterotune.across_classes(lambda: iter(devices), alignment, summed=summed)[KEY].ravel()


def two(cosine, lengths=(1.0, 1.0)):
    """Steps (16,) of two classes at this cosine."""
    first, other = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 2)))[0].T
    return [lengths[0] * first, lengths[1] * (cosine * first + np.sqrt(1 - cosine**2) * other)]


def left_one_out(steps, shares):
    """CMGA's step by its equation, from classes' steps in float64."""
    mended = []
    for number, step in enumerate(steps):
        rest = [each for each in range(len(steps)) if each != number]
        g = sum(shares[each] * steps[each] / np.linalg.norm(steps[each]) for each in rest)
        mended.append(step - min(0.0, step @ g) / (g @ g) * g)
    plain, step = (sum(p * d for p, d in zip(shares, ds, strict=True)) for ds in (steps, mended))
    return step * np.linalg.norm(plain) / np.linalg.norm(step)


def test_a_class_loses_what_opposes_the_others_at_any_negative_cosine():
    steps = np.random.default_rng(3).normal(size=(3, 16))
    steps -= 0.8 * steps.mean(0)
    rows = (30, 10, 5)
    devices = [sent(name, step, n) for name, step, n in zip("mno", steps, rows, strict=True)]
    truth = left_one_out(steps, np.array(rows) / 45)
    assert np.abs(truth - np.array(rows) / 45 @ steps).max() > 0.05
    np.testing.assert_allclose(merged(devices), truth, atol=1e-5)


@pytest.mark.parametrize(("cosine", "acts"), [(-0.6, True), (-0.05, True), (0.05, False), (0.6, False)])
def test_two_equal_classes_are_parted_where_they_oppose_each_other_and_only_there(cosine, acts):
    steps = two(cosine, (1.0, 2.0))
    devices = [sent(name, step) for name, step in zip("mn", steps, strict=True)]
    step, plain = merged(devices), merged(devices, "off")
    np.testing.assert_allclose(plain, np.mean(steps, 0), atol=1e-6)
    assert bool(np.abs(step - plain).max() > 0.01) is acts
    np.testing.assert_allclose(step, left_one_out(steps, (0.5, 0.5)) if acts else plain, atol=1e-5)
    if acts:  # after the projection neither class moves against the other
        directions = [d - d @ other / (other @ other) * other for d, other in (steps, steps[::-1])]
        assert min(d @ other for d, other in zip(directions, steps[::-1], strict=True)) > -1e-9


def test_classes_with_nothing_in_common_but_their_line_leave_the_version():
    assert not merged([sent("m", two(0)[0]), sent("n", -2 * two(0)[0])]).any()
    assert not merged([sent("m", np.zeros(16)), sent("n", np.zeros(16))]).any()


def test_a_class_that_did_not_move_has_no_say_in_what_the_others_oppose():
    steps = two(-0.5)
    devices = [sent(name, step) for name, step in zip("mn", steps, strict=True)]
    still = merged([*devices, sent("o", np.zeros(16))])
    np.testing.assert_allclose(still, merged(devices) * 2 / 3, atol=1e-6)


def test_a_class_is_the_mean_of_its_devices_and_counts_by_its_rows():
    first, other = two(-0.5)
    devices = [sent("m", first, 30), sent("m", first + 1, 10), sent("n", other, 20)]
    truth = left_one_out([first + 0.25, other], (2 / 3, 1 / 3))
    np.testing.assert_allclose(merged(devices), truth, atol=1e-5)
    np.testing.assert_allclose(merged(devices[::-1]), truth, atol=1e-5)


@pytest.mark.parametrize("alignment", ["leave-one-out", "off"])
def test_steps_that_are_summed_are_the_mean_times_the_classes_that_moved_the_tensor(alignment):
    same = [sent(name, two(0)[0], rows) for name, rows in (("m", 5), ("m", 9), ("n", 20))]
    np.testing.assert_allclose(merged(same, alignment), two(0)[0], atol=1e-6)
    np.testing.assert_allclose(merged(same, alignment, summed=True), 2 * two(0)[0], atol=1e-6)
    alone = [*same[:2], sent("n", two(0)[0], 20, "stages.1.q.C")]
    np.testing.assert_allclose(merged(alone, alignment, summed=True), two(0)[0], atol=1e-6)


def adapted(tiny, method, zero=""):
    """A model whose adapter holds drawn factors, and the adapter. zero: a factor that is 0."""
    model = tiny("llama")
    adapter = attach.attach(model, LAYERS, SPEC, method, seed=0)
    values = random_state(adapter)
    values |= {key: 0 * value for key, value in values.items() if key[-1] == zero}
    attach.load_state(adapter, values)
    return model, adapter


@pytest.mark.parametrize(("method", "zero"), [(LINEAR, "C"), (MIXTURE, "V")])
def test_a_branch_changes_nothing_at_the_start_and_layers_of_a_stage_share_it(tiny, method, zero):
    plain = tiny("llama")
    start = attach.attach(model := tiny("llama"), LAYERS, SPEC, method, seed=0)
    assert difference(logits(model), logits(plain)) < 1e-6
    shared = [key for key in start.factors if key.startswith("stages") and key.endswith(f".q.{zero}")]
    assert shared == [f"stages.0.q.{zero}", f"stages.1.q.{zero}"]
    # nor with maps into the frame and a LoRA; and what is 0 trains
    model, adapter = adapted(tiny, method, zero)
    lora = attach.attach(beside := tiny("llama"), LAYERS, SPEC, fedit.METHOD, seed=0)
    state = attach.state(adapter)
    attach.load_state(lora, {key: state[key] for key in lora.factors})
    assert difference(logits(model), logits(beside)) < 1e-6
    model(IDS, labels=IDS).loss.backward()
    assert adapter.factors[f"stages.0.q.{zero}"].grad.any()
    # a branch that has learned does change the model
    model, adapter = adapted(tiny, method)
    assert difference(logits(model), logits(beside)) > 1e-3
    model(IDS, labels=IDS).loss.backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in adapter.trained())


def test_the_linear_branch_and_the_lora_are_one_lora_for_exports(tiny, facts_of):
    model, adapter = adapted(tiny, LINEAR)
    state, facts = attach.state(adapter), facts_of(tiny("llama"))
    folded = learned.fold(state, facts, LAYERS, SPEC, LINEAR, 1)
    F, G, C = (state[key].astype(np.float64) for key in ("layers.0.q.F", "layers.0.q.G", KEY))
    A, B = (state[f"layers.0.q.{name}"].astype(np.float64) for name in "AB")
    joined_A, joined_B = folded.factors[0, "q"]
    assert len(joined_A) == 4 + 3
    np.testing.assert_allclose(joined_B.astype(np.float64) @ joined_A, 3 * (B @ A + G @ C @ F), atol=1e-4)
    learned_model = tiny("llama")
    attach.put_on(learned_model, folded)
    assert difference(logits(learned_model), logits(model)) < 1e-5


def test_the_gradient_of_a_shared_branch_is_the_sum_over_its_layers(tiny):
    model, adapter = adapted(tiny, LINEAR)
    model.double()
    key, at = KEY, (0, 1)
    model(IDS, labels=IDS).loss.backward()
    losses = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            adapter.factors[key][at] += step
            losses.append(float(model(IDS, labels=IDS).loss))
            adapter.factors[key][at] -= step
    assert float(adapter.factors[key].grad[at]) == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=5e-3)


def drawn_mixture():
    draw = torch.Generator().manual_seed(0)
    U, V, w, u = (torch.randn(*shape, generator=draw) for shape in ((10, 3), (3, 10), (2, 3), (7, 3)))
    return {"U": U, "V": V, "w": w}, u


def written_out(factors, u, gates):
    """Σ_j gate_j V_j GELU(U_j u), a token and a branch at a time; gates: (tokens, branches)."""
    U, V = (factors[name].double() for name in "UV")
    outputs = []
    for row, token in zip(gates, u.double(), strict=True):
        parts = (slice(5 * branch, 5 * branch + 5) for branch in range(2))
        units = [V[:, part] @ torch.nn.functional.gelu(U[part] @ token) for part in parts]
        outputs.append(sum(gate * value for gate, value in zip(row, units, strict=True)))
    return torch.stack(outputs)


def test_a_mixture_is_its_equation_and_each_token_gates_its_branches():
    factors, u = drawn_mixture()
    gates = (u @ factors["w"].T).double().softmax(-1)
    seen = heterotune.mixture(factors, u).double()
    assert torch.allclose(seen, written_out(factors, u, gates), atol=1e-5)
    fixed = gates.mean(0).expand_as(gates)  # the same for all tokens, as private gates were
    assert not torch.allclose(seen, written_out(factors, u, fixed), atol=1e-2)
    assert not torch.allclose(heterotune.mixture(factors, 2 * u).double(), 2 * seen, atol=1e-2)


def test_a_mixture_lies_beside_the_layer_and_is_no_lora(tiny, facts_of):
    model, adapter = adapted(tiny, MIXTURE)
    state = attach.state(adapter)
    linear = next(module for module in model.modules() if isinstance(module, attach.AdapterLinear))
    x = torch.randn(2, 3, linear.base.weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = linear(x)
        held = linear.factors
        inside = heterotune.mixture(held, x @ held["F"].T)
        truth = linear.base(x) + 3 * (x @ held["A"].T @ held["B"].T + inside @ held["G"].T)
    assert torch.allclose(seen, truth, atol=1e-3)
    with pytest.raises(InputError, match="branches of heterotune depend on the token"):
        learned.fold(state, facts_of(tiny("llama")), LAYERS, SPEC, MIXTURE, 1)


def test_fedadapters_core_is_the_plain_sum_and_its_branches_the_mean_over_holders():
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.randn(*shape, generator=draw) for shape in ((6, 4), (4, 6)))
    truth = torch.eye(4) + sum(V[:, 2 * j : 2 * j + 2] @ U[2 * j : 2 * j + 2] for j in range(3))
    assert torch.allclose(fedadapter.METHOD.core({"U": U, "V": V}, 0.5), truth, atol=1e-6)
    low, high = (np.random.default_rng(rank).normal(size=(rank, rank)) for rank in (2, 4))
    before = {"stages.0.q.V": np.zeros((4, 4), np.float32)}
    devices = [
        Contribution(before, {"stages.0.q.V": value.astype(np.float32)}, samples, name)
        for value, samples, name in ((low, 10, "m"), (high, 30, "n"))
    ]
    step = fedadapter.METHOD.merges["stages"](lambda: iter(devices))["stages.0.q.V"]
    truth = high.copy()
    truth[:2, :2] = (10 * low + 30 * truth[:2, :2]) / 40
    np.testing.assert_allclose(step, truth, atol=1e-6)


def test_a_device_of_lower_rank_starts_from_the_leading_part_of_what_is_drawn(tiny):
    method = fedadapter.FedAdapter(width=2, stages=2).method()
    full = attach.state(attach.attach(tiny("llama"), LAYERS, SPEC, method, seed=0))
    held = attach.state(attach.attach(tiny("llama"), LAYERS, SPEC.at(2), method, 0, fleet_rank=4))
    for key, value in held.items():
        assert np.array_equal(value, full[key][tuple(map(slice, value.shape))]), key
    assert {held[f"stages.0.q.{name}"].shape for name in "UV"} == {(2, 2)}


def of(**values):
    return methods.build(settings.MethodChoice("heterotune", values))


def test_branches_cross_models_or_stay_in_the_class():
    assert of().scope("stages") == "fleet"
    assert of(across=False).scope("stages") == "class"
    assert of().aligned and of(form="mixture").aligned


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"branch": 2}, "no key `branch`; did you mean `branches`"),
        ({"alignment": "left"}, "Invalid enum value 'left'"),
        ({"width": 0}, "Expected `int` >= 1"),
        ({"width": "wide"}, "Expected `int`, got `str`"),
    ],
)
def test_settings_that_do_not_fit_are_named(values, reason):
    with pytest.raises(InputError, match=reason):
        of(**values)


def test_a_method_without_settings_says_so():
    with pytest.raises(
        InputError, match=r"\[method\] fedit has no key `width`; known keys: momentum, name, server_step"
    ):
        methods.build(settings.MethodChoice("fedit", {"width": 2}))
    tables = {"method": {"names": "ffa"}, "catalog": [{"source": "m"}], "fleet": {"name": "f"}}
    with pytest.raises(InputError, match=r"\[method\] fedit has no key `names`; did you mean `name`"):
        methods.build(settings.parse(tables).method)
