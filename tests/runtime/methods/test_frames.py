"""The common frame: what two models make of the same texts has the same coordinates in it."""

import numpy as np
import pytest

from edge_runtime import methods, settings
from edge_runtime.aggregator import check
from edge_runtime.errors import InputError
from edge_runtime.methods import frames
from edge_runtime.methods.interface import Contribution
from edge_runtime.protocol import codec

TEXTS, LATENT = 400, 12


def activations(seed, width, texts=TEXTS, meaning=0):
    """Of texts with common meanings, seen by a model of its own: mixed, offset and noisy."""
    shared = np.random.default_rng(meaning).normal(size=(texts, LATENT))
    draw = np.random.default_rng(seed)
    mixed = shared @ draw.normal(size=(LATENT, width)) + 0.3 * draw.normal(size=(texts, width))
    return (mixed + 5 * draw.normal(size=width)).astype(np.float32)


@pytest.fixture
def two():
    """Activations of two models, of unequal widths, on the public texts."""
    return activations(1, 40), activations(2, 64)


def agreement(first, second):
    """Mean cosine between the two models' coordinates of a text."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / lengths).mean())


def seen(each, Z, name=None, width=LATENT):
    turned = Z[:, :width] if name is None else Z[:, :width] @ frames.rotation(name, width)
    F, _ = frames.into(each, turned)
    return each @ F.T


def test_features_are_whitened_and_padded(two):
    X = frames.features(two[0])
    assert X.shape == (TEXTS, frames.FEATURES) and not X[:, 40:].any()
    np.testing.assert_allclose(X[:, :40].T @ X[:, :40] / TEXTS, np.eye(40), atol=1e-4)


def test_two_models_see_a_text_alike_in_the_common_frame_and_not_in_rotated_ones(two):
    Z = frames.common([frames.features(each) for each in two], None)
    assert Z.shape == (TEXTS, frames.WIDTH)
    assert agreement(*(seen(each, Z) for each in two)) > 0.9
    rotated = [seen(each, Z, name) for each, name in zip(two, "ab", strict=True)]
    assert abs(agreement(*rotated)) < 0.2


def test_texts_that_made_no_frame_are_seen_alike_too():
    models = [(activations(seed, width, 2 * TEXTS)) for seed, width in ((1, 40), (2, 64))]
    Z = frames.common([frames.features(each[:TEXTS]) for each in models], None)
    maps = [frames.into(each[:TEXTS], Z[:, :LATENT])[0] for each in models]
    others = [each[TEXTS:] @ F.T for each, F in zip(models, maps, strict=True)]
    assert agreement(*others) > 0.8


def test_the_mean_activation_is_not_seen(two):
    F, _ = frames.into(two[0], frames.common([frames.features(two[0])], None)[:, :LATENT])
    np.testing.assert_allclose(F @ two[0].mean(0), 0, atol=1e-3)


def test_a_layer_that_tells_no_texts_apart_is_not_in_the_frame(two):
    """As the first layer, where all texts end in one token: no map of rounding errors."""
    Z = frames.common([frames.features(each) for each in two], None)[:, :LATENT]
    alike = np.repeat(two[0][:1], TEXTS, 0)
    rounded = alike * (1 + 1e-7 * np.random.default_rng(0).normal(size=(TEXTS, 1)).astype(np.float32))
    for each in (alike, rounded, 0 * alike):
        F, moments = frames.into(each, Z)
        assert F.shape == (LATENT, 40) and moments.shape == (40, LATENT)
        assert not F.any() and not moments.any()
    hardly = alike + 1e-2 * np.random.default_rng(0).normal(size=alike.shape).astype(np.float32)
    assert all(part.any() for part in frames.into(hardly, Z))


def test_a_class_that_joins_leaves_the_frame_where_it_was(two):
    third = frames.features(activations(3, 48))
    before = frames.common([frames.features(each) for each in two], None)
    joined = [*(frames.features(each) for each in two), third]
    after, anew = frames.common(joined, before), frames.common(joined, None)
    assert agreement(after[:, :LATENT], before[:, :LATENT]) > 0.8
    assert agreement(after, before) >= agreement(anew, before)


def sent(features):
    return Contribution({}, {frames.SENT: features}, 10, "m")


def turned(features, seed):
    """The same features in other coordinates, as another device of the class may have them."""
    used = features[:, features.any(0)]
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(used.shape[1],) * 2))[0]
    return np.concatenate([used @ rotation, np.zeros((len(used), frames.FEATURES - used.shape[1]))], 1)


def test_a_device_that_sends_noise_does_not_decide_the_features_of_its_class(two):
    honest = frames.features(two[0])
    noise = frames.features(np.random.default_rng(9).normal(size=(TEXTS, 300)).astype(np.float32))
    for place in range(3):
        devices = [sent(turned(honest, seed)) for seed in (1, 2)]
        devices.insert(place, sent(noise))
        chosen = frames.central(lambda devices=devices: devices)[frames.SENT]
        assert chosen is not noise and np.linalg.norm(chosen.T @ honest) > 0.9 * np.linalg.norm(
            honest.T @ honest
        )
    assert frames.central(lambda: [sent(noise)])[frames.SENT] is noise  # there is no other
    assert frames.central(lambda: []) == {}


def test_what_is_no_features_of_a_model_is_told(two):
    X = frames.features(two[0])
    assert frames.fault(X) is None
    rounded = codec.decode(codec.encode({frames.SENT: X}))[frames.SENT]
    assert not np.array_equal(rounded, X) and frames.fault(rounded) is None
    massive = two[0] + 1e4 * np.eye(1, 40, dtype=np.float32)  # a channel with a large mean
    assert frames.fault(frames.features(massive)) is None
    for bad in (0 * X, 2 * X, X + 1, 1e30 * X, np.repeat(X[:, :1], frames.FEATURES, 1)):
        assert frames.fault(bad.astype(np.float32)) is not None


def test_features_come_alone_and_before_all_else():
    tables = {"fleet": {"name": "f"}, "catalog": [{"source": "m"}], "adapter": {"rank": 4}}
    public = {"file": "public.jsonl", "texts": TEXTS}
    fleet = settings.parse({**tables, "method": {"name": "heterotune"}, "public": public})
    X, C = frames.features(activations(1, 40)), np.ones((16, 16), np.float32)
    known = {frames.SENT: X.shape}

    def checked(delta, expected):
        return check.check(codec.encode(delta), expected, fleet, methods.of(fleet)).keys()

    assert checked({frames.SENT: X}, {}) == checked({frames.SENT: X}, known) == {frames.SENT}
    assert checked({"stages.0.q.C": C}, known) == {"stages.0.q.C"}
    for delta, expected, reason in (
        ({"stages.0.q.C": C}, {}, "lacks frame.X, which no device of its model class has sent yet"),
        ({frames.SENT: X, "stages.0.q.C": C}, {}, "frame.X beside other tensors or answers"),
        ({frames.SENT: 3 * X}, {}, "features frame.X are off white by"),
        ({frames.SENT: X[:9]}, {}, r"frame.X is \(9, 256\) in the delta"),
        ({frames.MADE: X}, known, "holds 'frame.Z', which this fleet's adapter does not exchange"),
    ):
        with pytest.raises(InputError, match=reason):
            checked(delta, expected)


def test_a_fleet_wide_head_needs_public_texts():
    tables = {"fleet": {"name": "f"}, "catalog": [{"source": "m"}], "head": {"shared": "fleet"}}
    with pytest.raises(InputError, match=r"add \[public\] with their file"):
        settings.parse(tables)
    fleet = settings.parse({**tables, "public": {"file": "public.jsonl", "texts": 5}})
    method = methods.of(fleet)
    assert method.framed and method.scope("labels") == "fleet" and method.scope("frame") == "class"
    assert method.factor("labels.a.H").shape({"one": 1, **method.sizes(4)}) == (1, frames.WIDTH)
    plain = methods.of(settings.parse({**tables, "head": {}}))
    assert not plain.framed
