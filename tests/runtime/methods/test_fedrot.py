"""FedRot-LoRA's turns towards the version, against the mean of the devices' products."""

import numpy as np
import pytest

from edge_runtime import methods
from edge_runtime.methods import fedit
from edge_runtime.methods.interface import Contribution

RANK, IN, OUT = 4, 24, 32
KEYS = ("layers.0.q.A", "layers.0.q.B")
MERGE = methods.METHODS["fedrot"].merges["layers"]
DRAW = np.random.default_rng(0)
VERSION = {
    KEYS[0]: DRAW.normal(0, 0.2, (RANK, IN)).astype(np.float32),
    KEYS[1]: DRAW.normal(0, 1, (OUT, RANK)).astype(np.float32),
}


def device(seed, samples=10, angle=0.0, version=VERSION):
    """A device that has learned something, and whose factors have turned inside their rank."""
    draw = np.random.default_rng(seed)
    A, B = (value + 0.1 * np.abs(value).mean() * draw.normal(0, 1, value.shape) for value in version.values())
    skew = draw.normal(0, angle, (RANK, RANK))
    R = np.linalg.qr(np.eye(RANK) + skew - skew.T)[0]
    after = (R.T @ A, B @ R)
    delta = {key: np.float32(value - version[key]) for key, value in zip(KEYS, after, strict=True)}
    return Contribution(version, delta, samples)


def product(state):
    return state[KEYS[1]].astype(np.float64) @ state[KEYS[0]]


def merged(devices, merge=MERGE):
    steps = merge(lambda: iter(devices))
    return product({key: value + steps[key] for key, value in devices[0].before.items()})


def error(devices, merge=MERGE):
    """Distance of the merged factors' product from the mean product, by the size of the mean step."""
    mean = sum(one.samples * product(one.after()) for one in devices) / sum(one.samples for one in devices)
    return np.linalg.norm(merged(devices, merge) - mean) / np.linalg.norm(mean - product(VERSION))


def test_devices_whose_factors_have_turned_apart_are_averaged_as_if_they_had_not():
    straight = [device(seed, 10 + seed) for seed in range(3)]
    turned = [device(seed, 10 + seed, angle=0.7) for seed in range(3)]
    np.testing.assert_allclose(merged(turned), merged(straight), atol=1e-5)
    assert error(turned) < 0.2 < 2 < error(turned, fedit.holders_mean)  # which fedit does not do
    assert error(straight) < 1.1 * error(straight, fedit.holders_mean)


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_one_device_makes_its_step_and_the_order_of_devices_is_nothing(angle):
    alone = device(0, angle=angle)
    np.testing.assert_allclose(merged([alone]), product(alone.after()), atol=1e-5)
    three = [device(seed, 5 * seed + 5, angle) for seed in range(3)]
    np.testing.assert_allclose(merged(three), merged(three[::-1]), atol=1e-5)


def test_in_round_1_the_factors_are_turned_by_a_alone():
    start = {KEYS[0]: VERSION[KEYS[0]], KEYS[1]: np.zeros_like(VERSION[KEYS[1]])}
    draw = np.random.default_rng(5)
    R = np.linalg.qr(draw.normal(0, 1, (RANK, RANK)))[0]
    B = draw.normal(0, 1, (OUT, RANK))
    delta = {KEYS[0]: np.float32(R.T @ start[KEYS[0]] - start[KEYS[0]]), KEYS[1]: np.float32(B @ R)}
    steps = MERGE(lambda: iter([Contribution(start, delta, 3)]))
    np.testing.assert_allclose(steps[KEYS[0]], 0, atol=1e-5)
    np.testing.assert_allclose(steps[KEYS[1]], B, atol=1e-5)
