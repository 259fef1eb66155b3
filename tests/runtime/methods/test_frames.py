"""The common frame: what two models make of the same texts has the same coordinates in it."""

import numpy as np
import pytest

from edge_runtime import methods, settings
from edge_runtime.errors import InputError
from edge_runtime.methods import frames
from edge_runtime.methods.interface import Contribution

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


def test_a_class_that_joins_leaves_the_frame_where_it_was(two):
    third = frames.features(activations(3, 48))
    before = frames.common([frames.features(each) for each in two], None)
    joined = [*(frames.features(each) for each in two), third]
    after, anew = frames.common(joined, before), frames.common(joined, None)
    assert agreement(after[:, :LATENT], before[:, :LATENT]) > 0.8
    assert agreement(after, before) >= agreement(anew, before)


def test_a_class_has_the_features_of_its_first_device():
    deltas = [{"frame.X": np.full((4, 3), value, np.float32)} for value in (1, 2)]
    given = [Contribution({}, delta, 10) for delta in deltas]
    assert (frames.first(lambda: given)["frame.X"] == 1).all()
    later = [Contribution({"frame.X": deltas[0]["frame.X"]}, deltas[1], 10)]
    assert frames.first(lambda: later) == {}


def test_a_fleet_wide_head_needs_public_texts():
    tables = {"fleet": {"name": "f"}, "catalog": [{"source": "m"}], "head": {"shared": "fleet"}}
    with pytest.raises(InputError, match=r"add \[public\] with their file"):
        settings.parse(tables)
    fleet = settings.parse({**tables, "public": {"file": "public.jsonl", "texts": 5}})
    method = methods.of(fleet)
    assert method.framed and method.scope("labels") == "fleet" and method.scope("frame") == "class"
    assert method.factor("labels.a.H").shape({"one": 1, **method.sizes(4)}) == (1, frames.WIDTH)
    plain = methods.of(settings.parse({**tables, "head": {}, "public": {"file": "public.jsonl"}}))
    assert not plain.framed
