"""What the node makes of the devices' deltas, against a dense computation in float64."""

import tracemalloc

import numpy as np
import pytest
from click.testing import CliRunner

from edge_runtime import cli, methods, settings
from edge_runtime.errors import InputError

SHAPES = {"layers.0.q.A": (4, 32), "layers.0.q.B": (48, 4), "layers.7.q.A": (4, 32), "layers.7.q.B": (48, 4)}


def delta(seed, keys=tuple(SHAPES)):
    draw = np.random.default_rng(seed)
    return {key: draw.normal(0, 1, SHAPES[key]).astype(np.float32) for key in keys}


def merged(updates):
    """What fedit makes of (delta, samples) pairs."""
    merger = methods.by_name("fedit").merger()
    for one, samples in updates:
        merger.add(one, samples)
    return merger.merged()


def reference(updates):
    """Σ p_k d_k with p_k = n_k / Σ n over the holders of each tensor, all at once and in float64."""
    found = {}
    for key in {key for one, _ in updates for key in one}:
        held = [(one[key].astype(np.float64), samples) for one, samples in updates if key in one]
        shares = np.array([samples for _, samples in held]) / sum(samples for _, samples in held)
        found[key] = np.tensordot(shares, np.stack([value for value, _ in held]), axes=1)
    return found


def assert_same(seen, truth):
    assert seen.keys() == truth.keys()
    for key in truth:
        assert seen[key].dtype == np.float32
        np.testing.assert_allclose(seen[key], truth[key], rtol=0, atol=1e-6, err_msg=key)


def test_fedit_is_the_mean_weighted_by_rows():
    updates = [(delta(0), 200), (delta(1), 31), (delta(2), 1)]
    assert_same(merged(updates), reference(updates))


def test_a_tensor_is_averaged_over_the_devices_that_hold_it():
    shallow = [key for key in SHAPES if key.startswith("layers.0.")]
    updates = [(delta(0), 10), (delta(1, shallow), 30), (delta(2, shallow), 7)]
    seen = merged(updates)
    assert_same(seen, reference(updates))
    np.testing.assert_allclose(seen["layers.7.q.A"], updates[0][0]["layers.7.q.A"], rtol=1e-6)


@pytest.mark.parametrize("fault", ["unweighted", "over all devices", "one forgotten"])
def test_the_comparison_sees_a_wrong_mean(fault):
    shallow = [key for key in SHAPES if key.startswith("layers.0.")]
    updates = [(delta(0), 10), (delta(1, shallow), 30), (delta(2), 7)]
    wrong = {
        "unweighted": [(one, 1) for one, _ in updates],
        "over all devices": [({**{key: 0 * value for key, value in delta(0).items()}, **one}, n) for one, n in updates],
        "one forgotten": updates[:2],
    }[fault]
    with pytest.raises(AssertionError):
        assert_same(merged(wrong), reference(updates))


def test_equal_devices_get_the_plain_mean_and_their_order_is_nothing():
    deltas = [delta(seed) for seed in range(4)]
    forth = merged([(one, 50) for one in deltas])
    back = merged([(one, 50) for one in reversed(deltas)])
    plain = {key: np.mean([one[key] for one in deltas], axis=0) for key in SHAPES}
    assert_same(forth, plain)
    assert_same(back, plain)


def test_devices_that_agree_are_followed_and_a_single_one_is_too():
    one = delta(0)
    assert_same(merged([(one, 3), (one, 500), (one, 11)]), one)
    assert_same(merged([(one, 3)]), one)


def test_the_deltas_that_came_in_are_left_as_they_were():
    first, second = delta(0), delta(1)
    merged([(first, 2), (second, 3)])
    assert_same(first, delta(0))
    assert_same(second, delta(1))


def test_a_round_without_updates_changes_nothing():
    assert merged([]) == {}


def grown_bytes(merger, updates):
    """Memory the merger holds more after many updates than after the first."""
    big = {"layers.0.q.A": np.ones((256, 256), np.float32)}
    tracemalloc.start()
    merger.add({key: value.copy() for key, value in big.items()}, 1)
    first = tracemalloc.get_traced_memory()[0]
    for _ in range(updates - 1):
        merger.add({key: value.copy() for key, value in big.items()}, 1)
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    return grown


def test_memory_does_not_grow_with_the_number_of_updates():
    class KeepsAll:
        def __init__(self):
            self.kept = []

        def add(self, delta, samples):
            self.kept.append((delta, samples))

    one_update = 256 * 256 * 4
    assert grown_bytes(methods.by_name("fedit").merger(), 40) < one_update / 10
    assert grown_bytes(KeepsAll(), 40) > 38 * one_update


def test_fedit_shares_both_factors_and_local_shares_nothing():
    assert all(methods.by_name("fedit").exchanged(key) for key in SHAPES)
    local = methods.by_name("local")
    assert not any(local.exchanged(key) for key in SHAPES)
    assert local.merger is None


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="there is no method `fedavg`; known: local, fedit"):
        methods.by_name("fedavg")


@pytest.mark.parametrize("command", [("plan",), ("aggregator", "--state", "node")])
def test_ranks_that_a_method_cannot_merge_are_refused_before_anything_is_read_or_said(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a node that went on would keep its state
    path = tmp_path / "fleet.toml"
    path.write_text('[fleet]\nname = "f"\n[adapter]\nrank = 8\nlower = [4]\n[[catalog]]\nsource = "nowhere"\n')
    refused = CliRunner().invoke(cli.app, [*command, "--fleet", str(path)]).exception
    assert isinstance(refused, InputError)
    assert "lower is (4,), but has to be left out with fedit, which merges factors of one rank, 8" in str(refused)


def test_unequal_ranks_are_for_methods_that_exchange_nothing():
    unequal = settings.Fleet("f", (settings.Model("m"),), adapter=settings.Adapter(rank=8, lower=(4,)))
    with pytest.raises(InputError, match="lower is"):
        methods.of(unequal)
    alone = settings.Method("local")
    assert methods.of(settings.Fleet("f", unequal.catalog, method=alone, adapter=unequal.adapter)).name == "local"
    assert methods.of(settings.Fleet("f", unequal.catalog)).name == "fedit"
