"""DeMA's core and CMGA's steps, against their equations in float64."""

import numpy as np
import pytest
import torch
from test_adapters import IDS, LAYERS, difference, logits, random_state

from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.errors import InputError
from edge_runtime.methods import fedadapter, heterotune
from edge_runtime.methods.interface import Contribution

SPEC = settings.Adapter(rank=4, alpha=12.0)
SETTINGS = {"branches": 2, "width": 2, "stages": 2}
METHOD = heterotune.HeteroTune(**SETTINGS).method()
KEYS = {"stages.0.q.U": (4, 4), "stages.0.q.V": (4, 4)}
DRAW = np.random.default_rng(0)


def made(of, seed, samples=10, rank=4, sign=1.0):
    draw = np.random.default_rng(seed)
    delta = {
        "stages.0.q.U": draw.normal(0, 1, (rank, rank)).astype(np.float32) * np.float32(sign),
        "stages.0.q.V": draw.normal(0, 1, (rank, rank)).astype(np.float32) * np.float32(sign),
    }
    return Contribution({key: np.zeros(shape, np.float32) for key, shape in KEYS.items()}, delta, samples, of)


def merged(devices, alignment):
    return heterotune.across_classes(lambda: iter(devices), alignment)


def class_means(devices):
    """p_c and d_c of the first tensor, in float64."""
    classes = sorted({one.model_class for one in devices})
    rows = {of: sum(one.samples for one in devices if one.model_class == of) for of in classes}
    means = [
        sum(
            one.samples * one.delta["stages.0.q.U"].astype(np.float64)
            for one in devices
            if one.model_class == of
        )
        / rows[of]
        for of in classes
    ]
    return np.array([rows[of] for of in classes]) / sum(rows.values()), [mean.ravel() for mean in means]


DEVICES = [made("m", 0, 30), made("m", 1, 3), made("n", 0, 10, sign=-1.0), made("o", 3, 5)]


def test_the_common_direction_loses_what_opposes_it():
    p, d = class_means(DEVICES)
    g = sum(share * one / np.linalg.norm(one) for share, one in zip(p, d, strict=True))
    mended = [one - min(0.0, one @ g) / (g @ g) * g for one in d]
    plain = sum(share * one for share, one in zip(p, d, strict=True))
    step = sum(share * one for share, one in zip(p, mended, strict=True))
    step *= np.linalg.norm(plain) / np.linalg.norm(step)
    assert any(one @ g < 0 for one in d)
    np.testing.assert_allclose(merged(DEVICES, "projection")["stages.0.q.U"].ravel(), step, atol=1e-6)
    assert all(one @ g >= -1e-12 for one in mended)


def test_pairwise_leaves_two_classes_without_conflict():
    two = [DEVICES[0], DEVICES[2]]
    p, (first, second) = class_means(two)
    assert first @ second < 0
    mended = [
        first - first @ second / (second @ second) * second,
        second - first @ second / (first @ first) * first,
    ]
    plain, step = p @ np.stack([first, second]), p @ np.stack(mended)
    assert np.linalg.norm(plain) > 1 > 1e-9 > np.linalg.norm(step)  # they are opposite, and nothing is left
    np.testing.assert_allclose(merged(two, "pairwise")["stages.0.q.U"].ravel(), step, atol=1e-6)


def test_pairwise_takes_from_each_class_what_opposes_any_of_the_others_as_they_were():
    three = [
        made(of, seed, samples, rank=2) for seed, of, samples in ((9, "m", 5), (10, "n", 10), (11, "o", 20))
    ]
    p, d = class_means(three)
    mended = []
    for own in range(3):
        left = d[own].copy()
        for other in (d[number] for number in range(3) if number != own):
            left -= min(0.0, left @ other) / (other @ other) * other
        mended.append(left)
    plain, step = p @ np.stack(d), p @ np.stack(mended)
    expected = step * np.linalg.norm(plain) / np.linalg.norm(step)
    assert (
        abs(np.linalg.norm(step) / np.linalg.norm(plain) - 1) > 0.1
    )  # what is left is brought to the mean's length
    np.testing.assert_allclose(merged(three, "pairwise")["stages.0.q.U"][:2, :2].ravel(), expected, atol=1e-6)


def test_off_is_the_mean_weighted_by_rows():
    p, d = class_means(DEVICES)
    np.testing.assert_allclose(merged(DEVICES, "off")["stages.0.q.U"].ravel(), p @ np.stack(d), atol=1e-6)


def test_cagrad_raises_the_least_progress_of_any_class():
    """Its step keeps to the radius around the mean, and is better for the worst class than the mean."""
    p, d = class_means([DEVICES[0], DEVICES[1], DEVICES[3], made("n", 0, 25, sign=-0.3)])
    flat, plain = np.stack(d), p @ np.stack(d)
    step = heterotune.combined(np.float32(d), p, "cagrad")
    radius = heterotune.CAGRAD_C * np.linalg.norm(plain)
    assert np.linalg.norm(step - plain) <= radius * 1.001
    assert (flat @ step).min() > (flat @ plain).min()


def test_cagrad_takes_a_class_that_is_alone_further():
    """The control of what crosses has to go as far."""
    _, (d,) = class_means([DEVICES[0]])
    np.testing.assert_allclose(heterotune.combined(d[None], np.ones(1), "cagrad"), 1.5 * d, rtol=1e-5)


def test_no_step_in_cagrads_radius_is_better_for_its_worst_class():
    """By duality that progress is the least of g_w · plain + c ‖plain‖ ‖g_w‖ over the simplex, here on a grid."""
    p, d = class_means([made(of, seed, rank=2) for seed, of in enumerate("mno")])
    flat, plain = np.stack(d), p @ np.stack(d)
    radius = heterotune.CAGRAD_C * np.linalg.norm(plain)
    grid = np.array([(a, b, 200 - a - b) for a in range(201) for b in range(201 - a)]) / 200
    mixed = grid @ flat
    bound = (mixed @ plain + radius * np.linalg.norm(mixed, axis=1)).min()
    step = heterotune.combined(np.float32(d), p, "cagrad")
    assert (flat @ step).min() == pytest.approx(bound, rel=2e-3)


def sent(of, step, samples=10):
    value = np.asarray(step, np.float32)
    return Contribution(
        {"stages.0.q.U": np.zeros((16, 16), np.float32)}, {"stages.0.q.U": value}, samples, of
    )


def test_the_gate_opens_where_all_classes_agree_more_than_chance_has_it():
    draw = np.random.default_rng(0)
    common, noise = draw.normal(0, 1, 256), draw.normal(0, 1, (3, 256))
    noise -= (noise @ common)[:, None] * common / (common @ common)  # cosines are those of the common part
    alike = [sent(of, (0.5 * common + one).reshape(16, 16)) for of, one in zip("mno", noise, strict=True)]
    for alignment in ("gate", "off"):
        np.testing.assert_allclose(
            merged(alike, alignment)["stages.0.q.U"].ravel(), 0.5 * common + noise.mean(0), atol=1e-5
        )
    apart = [*alike[:2], sent("o", noise[2].reshape(16, 16))]  # one has nothing in common with the others
    assert not merged(apart, "gate")["stages.0.q.U"].any()
    assert merged(apart, "off")["stages.0.q.U"].any()
    assert merged(alike[:1], "gate")["stages.0.q.U"].any()  # a class alone is followed
    still = [*alike[:2], sent("o", np.zeros((16, 16)))]  # who did not move has no say
    assert merged(still, "gate")["stages.0.q.U"].any()


def test_the_gate_looks_at_what_all_classes_hold():
    """Opposite steps on the block that both hold: what one class alone has is no agreement."""
    wide, block = np.random.default_rng(0).normal(0, 1, (2, 16, 16))
    wide[:8, :8] = -block[:8, :8]
    assert not merged([sent("m", wide), sent("n", block[:8, :8])], "gate")["stages.0.q.U"].any()
    wide[:8, :8] = block[:8, :8]
    assert merged([sent("m", wide), sent("n", block[:8, :8])], "gate")["stages.0.q.U"].all()


@pytest.mark.parametrize("alignment", ["projection", "pairwise", "gate", "off"])
def test_devices_that_agree_are_followed(alignment):
    """In one class or in several; a step of equal devices is theirs."""
    for classes in ("mmm", "mno"):
        same = [made(of, 7, samples) for of, samples in zip(classes, (5, 10, 20), strict=True)]
        step = merged(same, alignment)
        for key in KEYS:
            np.testing.assert_allclose(step[key], same[0].delta[key], atol=1e-5)


def test_a_device_of_lower_rank_counts_where_it_holds_an_entry():
    low, high = made("m", 0, 10, rank=2), made("m", 1, 30)
    step = merged([low, high], "projection")["stages.0.q.U"]
    truth = high.delta["stages.0.q.U"].astype(np.float64)
    truth[:2, :2] = (10 * low.delta["stages.0.q.U"] + 30 * truth[:2, :2]) / 40
    np.testing.assert_allclose(step, truth, atol=1e-6)


@pytest.mark.parametrize("alignment", ["gate", "off"])
def test_each_entry_is_averaged_over_its_holders_whatever_their_ranks(alignment):
    rows = {"m": [(4, 100, 1.0), (2, 50, 1.0)], "n": [(4, 100, 0.4)]}
    devices = [
        sent(of, np.full((rank, rank), step), samples)
        for of, some in rows.items()
        for rank, samples, step in some
    ]
    expected = np.full((4, 4), (100 + 40) / 200)
    expected[:2, :2] = (150 + 40) / 250
    np.testing.assert_allclose(merged(devices, alignment)["stages.0.q.U"][:4, :4], expected, atol=1e-6)


@pytest.mark.parametrize("alignment", ["projection", "pairwise", "off"])
def test_what_one_class_alone_holds_is_not_thinned_by_the_others(alignment):
    before = made("m", 0).before
    ones = {rank: {"stages.0.q.U": np.ones((rank, rank), np.float32)} for rank in (2, 4)}
    step = merged([Contribution(before, ones[4], 10, "m"), Contribution(before, ones[2], 10, "n")], alignment)
    np.testing.assert_allclose(step["stages.0.q.U"], np.ones((4, 4)), atol=1e-6)


def test_a_device_of_lower_rank_starts_from_the_leading_part_of_what_is_drawn(tiny):
    full = attach.state(attach.attach(tiny("llama"), LAYERS, settings.Adapter(rank=4), METHOD, seed=0))
    low = settings.Adapter(rank=4).at(2)
    held = attach.state(attach.attach(tiny("llama"), LAYERS, low, METHOD, 0, fleet_rank=4))
    for key, value in held.items():
        assert np.array_equal(value, full[key][tuple(map(slice, value.shape))]), key
    assert {held[f"stages.0.q.{name}"].shape for name in "UV"} == {(2, 2)}


def test_the_order_of_devices_is_nothing():
    for alignment in ("projection", "pairwise", "off", "cagrad", "gate"):
        forth, back = merged(DEVICES, alignment), merged(DEVICES[::-1], alignment)
        for key in KEYS:
            np.testing.assert_allclose(forth[key], back[key], atol=1e-5)


def test_the_core_is_the_sum_of_its_branches():
    draw = torch.Generator().manual_seed(0)
    U, V, g = (torch.randn(*shape, generator=draw) for shape in ((6, 4), (4, 6), (3,)))
    shares = 3 * torch.softmax(g, 0)
    truth = torch.eye(4) + sum(shares[j] * V[:, 2 * j : 2 * j + 2] @ U[2 * j : 2 * j + 2] for j in range(3))
    assert torch.allclose(heterotune.core({"U": U, "V": V, "g": g}, 0.5), truth, atol=1e-6)


def test_branches_are_as_many_as_the_rank_has_room_for():
    method = heterotune.HeteroTune(branches=3, width=4).method()
    assert [method.sizes(rank)["branches"] for rank in (16, 8, 4, 2)] == [3, 2, 1, 1]


def attached(model):
    return attach.attach(model, LAYERS, SPEC, METHOD, seed=0)


def test_version_0_changes_nothing_and_layers_of_a_stage_share_their_branches(tiny):
    model, plain = tiny("llama"), logits(tiny("llama"))
    adapter = attached(model)
    assert difference(plain, logits(model)) < 1e-6
    attach.load_state(adapter, random_state(adapter))
    model(IDS, labels=IDS).loss.backward()
    of_u = [key for key in adapter.factors if key.endswith("q.U")]
    assert of_u == ["stages.0.q.U", "stages.1.q.U"]
    assert all(factor.grad is not None and factor.grad.any() for factor in adapter.trained())


def test_the_gradient_of_a_shared_branch_is_the_sum_over_its_layers(tiny):
    model = tiny("llama").double()
    adapter = attached(model)
    attach.load_state(adapter, random_state(adapter))
    for factor in adapter.factors.values():
        factor.data = factor.data.double()
    key, at = "stages.0.q.V", (0, 1)
    model(IDS, labels=IDS).loss.backward()
    losses = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            adapter.factors[key][at] += step
            losses.append(float(model(IDS, labels=IDS).loss))
            adapter.factors[key][at] -= step
    assert float(adapter.factors[key].grad[at]) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=5e-3)


def test_fedadapters_core_is_the_plain_sum_and_its_branches_the_mean_over_holders(tiny):
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.randn(*shape, generator=draw) for shape in ((6, 4), (4, 6)))
    truth = torch.eye(4) + sum(V[:, 2 * j : 2 * j + 2] @ U[2 * j : 2 * j + 2] for j in range(3))
    assert torch.allclose(fedadapter.METHOD.core({"U": U, "V": V}, 0.5), truth, atol=1e-6)
    low, high = made("m", 0, 10, rank=2), made("n", 1, 30)
    step = fedadapter.METHOD.merges["stages"](lambda: iter([low, high]))["stages.0.q.V"]
    truth = high.delta["stages.0.q.V"].astype(np.float64)
    truth[:2, :2] = (10 * low.delta["stages.0.q.V"] + 30 * truth[:2, :2]) / 40
    np.testing.assert_allclose(step, truth, atol=1e-6)


def of(**values):
    return methods.build(settings.MethodChoice("heterotune", values), None, None)


def test_its_controls_exchange_less():
    assert of().scope("stages") == "fleet"
    assert of(across=False).scope("stages") == "class"
    assert "stages" not in of(core="frozen").merges
    assert not of(core="frozen").factors["V"].trained
    assert of(core="frozen").factors["V"].start == "drawn"


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
        methods.build(settings.MethodChoice("fedit", {"width": 2}), None, None)
    with pytest.raises(InputError, match=r"\[method\] fedit has no key `names`; did you mean `name`"):
        methods.build(
            settings.parse(
                {"method": {"names": "ffa"}, "catalog": [{"source": "m"}], "fleet": {"name": "f"}}
            ).method,
            None,
            None,
        )
