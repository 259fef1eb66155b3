"""A and B of devices of unequal ranks: the mean of product steps, in its best factors for each rank."""

import tracemalloc

import numpy as np
import pytest

from edge_runtime import methods, settings
from edge_runtime.methods import fedit, flexlora, unequal
from edge_runtime.methods.interface import Contribution

RANK, IN, OUT = 8, 40, 56
LAYERS = ("layers.0.q", "layers.5.q")


def factors(draw, rank, scale=1.0):
    shapes = {"A": (rank, IN), "B": (OUT, rank)}
    return {
        f"{layer}.{name}": (scale * draw.normal(0, 1, shape)).astype(np.float32)
        for layer in LAYERS
        for name, shape in shapes.items()
    }


VERSION = factors(np.random.default_rng(9), RANK)


def device(seed, rank, samples=10, layers=LAYERS):
    sent = factors(np.random.default_rng(seed), rank, 0.3)
    held = {key: value for key, value in sent.items() if key.rpartition(".")[0] in layers}
    return Contribution(VERSION, held, samples)


def merged(devices, merge=unequal.mean):
    """The version after the round."""
    steps = merge(lambda: iter(devices))
    return {key: value + steps.get(key, 0) for key, value in VERSION.items()}


def product(state, layer, rank=RANK):
    return state[f"{layer}.B"][:, :rank].astype(np.float64) @ state[f"{layer}.A"][:rank]


def mean_product(devices, layer):
    """B A + Σ p_k (B_k A_k - B[:, :r_k] A[:r_k]) in float64, with whole matrices."""
    steps, rows = np.zeros((OUT, IN)), 0
    for one in devices:
        if f"{layer}.A" in one.delta:
            rank = len(one.delta[f"{layer}.A"])
            steps += one.samples * (product(one.after(), layer, rank) - product(VERSION, layer, rank))
            rows += one.samples
    return product(VERSION, layer) + steps / rows


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


UNEQUAL = [device(0, 8, 30), device(1, 4, 20), device(2, 2, 50), device(3, 2, 10, LAYERS[:1])]


def test_each_leading_part_is_the_best_of_the_mean_product_in_its_rank():
    after, entries = merged(UNEQUAL), merged(UNEQUAL, fedit.holders_mean)
    for layer in LAYERS:
        truth = mean_product(UNEQUAL, layer)
        size = np.linalg.norm(truth)
        for rank in (8, 4, 2):
            least = np.linalg.norm(truth - best(truth, rank)) / size
            error, of_entries = (
                np.linalg.norm(truth - product(state, layer, rank)) / size for state in (after, entries)
            )
            assert error < 1.01 * least + 1e-4
            assert of_entries > 1.15 * least + 0.03  # the mean of entries is seen to be another


def test_with_one_rank_in_a_layer_entries_are_averaged_as_in_fedit():
    for ranks in ((8, 8), (4, 4)):
        equal = [device(number, rank, 10 + number) for number, rank in enumerate(ranks)]
        after, entries = merged(equal), merged(equal, fedit.holders_mean)
        assert all(np.array_equal(after[key], entries[key]) for key in VERSION)
    # one layer's devices differ, and the other layer has a single device
    mixed = [device(0, 8), device(1, 2, layers=LAYERS[:1])]
    after, entries = merged(mixed), merged(mixed, fedit.holders_mean)
    for key, value in entries.items():
        assert np.array_equal(after[key], value) is key.startswith(LAYERS[1])


@pytest.mark.parametrize("rank", [8, 2])
def test_one_device_and_its_like_make_its_step(rank):
    """Beside a device of another rank that has learned nothing, and counts half."""
    alone = device(0, rank)
    idle = Contribution(VERSION, {key: 0 * value for key, value in device(1, 10 - rank).delta.items()}, 10)
    after, both = merged([alone]), merged([alone, idle])
    for layer in LAYERS:
        step = product(alone.after(), layer, rank) - product(VERSION, layer, rank)
        np.testing.assert_allclose(product(after, layer), product(VERSION, layer) + step, atol=1e-4)
        truth = product(VERSION, layer) + step / 2
        np.testing.assert_allclose(product(both, layer), best(truth, RANK), atol=1e-3 * np.abs(truth).max())


def test_the_order_of_devices_is_nothing():
    forth, back = merged(UNEQUAL), merged(UNEQUAL[::-1])
    for layer in LAYERS:
        for rank in (8, 4, 2):
            np.testing.assert_allclose(product(forth, layer, rank), product(back, layer, rank), atol=1e-3)


def test_factors_turn_no_further_than_their_products_need():
    """Devices that changed nothing leave factors whose leading products are the best already."""
    version = merged(UNEQUAL)  # in the form that a first round leaves
    idle = [
        Contribution(version, {key: 0 * value for key, value in device(0, rank).delta.items()}, 10)
        for rank in (8, 4, 2)
    ]
    moved = unequal.mean(lambda: iter(idle))
    for key, value in moved.items():
        np.testing.assert_allclose(value, 0, atol=2e-3 * np.abs(version[key]).max(), err_msg=key)
    # without R, signs and near directions are anyone's guess
    for _, old, new in flexlora.best_factors(lambda: iter(idle[:1])):
        assert np.abs(new.A - old.A).max() > 0.1


def test_a_core_between_the_factors_goes_on_with_what_it_did():
    """B C A after a merge, beside the mean over the devices; without R the core meets other axes."""
    version = merged(UNEQUAL)
    learned = np.random.default_rng(1).normal(0, 1, (RANK, RANK))
    core = np.eye(RANK) + 0.5 * learned / np.linalg.norm(learned, 2)
    devices = []
    for seed, rank in enumerate((8, 4, 2)):
        delta = {}
        for key, value in device(20 + seed, rank).delta.items():
            held = version[key][tuple(map(slice, value.shape))]
            delta[key] = np.float32(0.1 * value * np.linalg.norm(held) / np.linalg.norm(value))
        devices.append(Contribution(version, delta, 10))
    whole = [unequal._padded(each, LAYERS) for each in devices]  # in the version's rank

    def function(state):
        return state["layers.0.q.B"].astype(np.float64) @ core @ state["layers.0.q.A"]

    def error(steps):
        after = {key: value + steps[key] for key, value in version.items()}
        truth = sum(function(each.after()) for each in whole) / 3
        return np.linalg.norm(function(after) - truth) / np.linalg.norm(truth)

    without = error(flexlora.mean_product(lambda: iter(whole)))
    assert error(unequal.mean(lambda: iter(devices))) < 0.05 < 0.2 < without


def test_a_layer_of_fewer_directions_than_ranks_keeps_its_product():
    draw, shapes = np.random.default_rng(0), {"A": (RANK, IN), "B": (3, RANK)}
    key = "layers.0.q"
    version, sent = (
        {f"{key}.{name}": draw.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in "12"
    )
    low = {f"{key}.A": sent[f"{key}.A"][:2], f"{key}.B": sent[f"{key}.B"][:, :2]}
    devices = [Contribution(version, sent, 10), Contribution(version, low, 10)]
    step = unequal.mean(lambda: iter(devices))
    after = {name: version[name] + value for name, value in step.items()}
    completed = product(devices[1].after(), key, 2) + version[f"{key}.B"][:, 2:] @ version[f"{key}.A"][2:]
    truth = (product(devices[0].after(), key) + completed) / 2
    np.testing.assert_allclose(product(after, key), truth, atol=1e-4)
    assert np.linalg.norm(after[f"{key}.A"], axis=1).min() > 0.1  # no row is dead


def test_memory_does_not_grow_with_the_number_of_devices():
    def peak_bytes(merge, count):
        version = {
            "layers.0.q.A": np.ones((64, 512), np.float32),
            "layers.0.q.B": np.ones((512, 64), np.float32),
        }

        def devices():
            for number in range(count):
                rank = 64 >> number % 3
                delta = {
                    "layers.0.q.A": version["layers.0.q.A"][:rank],
                    "layers.0.q.B": version["layers.0.q.B"][:, :rank],
                }
                yield Contribution(version, {key: value.copy() for key, value in delta.items()}, 1)

        tracemalloc.start()
        merge(devices)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(unequal.mean, 4)  # what is imported for it stays
    update = 2 * 64 * 512 * 4
    assert peak_bytes(unequal.mean, 40) - peak_bytes(unequal.mean, 4) < update / 2
    assert peak_bytes(lambda devices: list(devices()), 40) > 15 * update  # what keeps all is seen


@pytest.mark.parametrize("name", ["heterotune", "fedadapter"])
def test_methods_of_unequal_ranks_write_new_factors_only_where_ranks_may_differ(name):
    for lower, refactored in (((), False), ((4,), True)):
        adapter = settings.Adapter(rank=8, lower=lower)
        fleet = settings.Fleet(
            "f",
            (settings.Model("m"),),
            method=settings.MethodChoice(name),
            adapter=adapter,
            public=settings.Public("texts.jsonl", 3) if methods.METHODS[name].aligned else None,
        )
        method = methods.of(fleet)
        assert method.merges["layers"] is unequal.mean and method.refactored is refactored
