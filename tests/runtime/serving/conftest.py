"""A tiny model of a family in a folder, its facts, and random things learned on it."""

import numpy as np
import pytest

from edge_runtime.adapters.learned import Learned
from edge_runtime.models.slices import kept_layers


@pytest.fixture
def checkpoint(tiny, facts_of, tmp_path):
    """checkpoint(family, **changes): the facts of a tiny model that is saved in a folder."""

    def save(family, **changes):
        model = tiny(family, **changes)
        model.save_pretrained(tmp_path)
        return facts_of(model, folder=str(tmp_path), weights=str(tmp_path))

    return save


@pytest.fixture
def learn():
    """learn(facts, depth, version): a random adapter, large enough to change what is written."""

    def draw(facts, depth=None, version=1, scale=0.4):
        layers = kept_layers(depth or facts.layers, facts.layers)
        random = np.random.default_rng(version)
        factors = {
            (layer, role): (
                random.normal(0, scale, (3, into)).astype(np.float32),
                random.normal(0, scale, (out, 3)).astype(np.float32),
            )
            for layer in layers
            for role, (out, into) in facts.linears.items()
        }
        return Learned(facts, layers, factors, version, "/models/tiny")

    return draw
