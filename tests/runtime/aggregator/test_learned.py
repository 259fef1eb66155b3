"""A node's state gives the adapter that its devices have, without any of them."""

import types

import numpy as np
import pytest
from edge_broker.journal import Journal

from edge_runtime import methods, settings
from edge_runtime.adapters import attach, learned
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator import learned as of_node
from edge_runtime.aggregator import merge, opening
from edge_runtime.aggregator.store import NodeStore
from edge_runtime.errors import InputError
from edge_runtime.methods import frames
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol import codec
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Report

SPEC = settings.Adapter(rank=4, alpha=8.0)


@pytest.fixture
def merged(tiny, facts_of, tmp_path):
    """merged(method, ...): a node's state after a round of one device, and what the device has learned."""
    facts = facts_of(tiny("llama"), model_class="tiny@12ab")

    def run(name, **values):
        choice, layers = settings.MethodChoice(name, values), kept_layers(3, 4)
        fleet = settings.Fleet(
            "f",
            (settings.Model("owner/tiny"),),
            method=choice,
            adapter=SPEC,
            seed=5,
            head=settings.Head(),
            public=settings.Public("texts.jsonl", 3) if methods.METHODS[name].aligned else None,
        )
        method = methods.of(fleet)
        adapter = attach.attach(tiny("llama", num_hidden_layers=3), layers, SPEC, method, fleet.seed, 4)
        start, draw = attach.state(adapter), np.random.default_rng(0)
        start["labels.cold.H"] = np.zeros((1, facts.hidden), np.float32)
        delta = {
            key: draw.normal(0, 0.1, value.shape).astype(np.float32)
            for key, value in start.items()
            if method.factor(key).exchanged
        }
        if method.framed:
            delta[frames.SENT] = frames.features(draw.normal(size=(3, 5)).astype(np.float32))
        payload = tmp_path / "payload"
        payload.write_bytes(codec.encode(delta))
        store = NodeStore(tmp_path / "node.db")
        opening.check_settings(fleet, [], store, Journal(store.connection, tmp_path), tmp_path)
        manifest = types.SimpleNamespace(model_class="tiny@12ab", samples=5)
        updates = [types.SimpleNamespace(manifest=manifest, payload=payload)]
        store.merged(1, merge.merge(updates, {}, fleet, method, 1, tmp_path / "versions"))
        plan = Plan("owner/tiny", "tiny@12ab", 3, 4, "float32", 4, 1, 8, terms={}, step_seconds=0.0)
        store.add_report(Report("a", "key", 1, "joined", 1, plan), "key")
        version = published(store.versions()["tiny@12ab"].chain, fleet.seed, method)
        store.connection.close()
        state = {key: version.get(key, value) for key, value in start.items()}
        return learned.fold(state, facts, layers, SPEC, method, 1)

    def read(name=None, version=None, depth=None):
        return of_node.read(tmp_path, lambda source: facts, name, version, depth)

    return run, read


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("fedit", {}),
        ("ffa", {}),
        ("fedsb", {"stages": 2, "across": True}),
        ("fedadapter", {}),
        ("hetlora", {}),
    ],
)
def test_the_node_has_what_the_device_has(merged, method, values):
    run, read = merged
    device, node = run(method, **values), read("tiny")
    assert (node.layers, node.version, node.labels) == (device.layers, 1, ("cold",))
    assert node.factors.keys() == device.factors.keys()
    assert np.array_equal(node.head, device.head)
    for place, pair in device.factors.items():
        for one, two in zip(node.factors[place], pair, strict=True):
            assert np.array_equal(one, two)
    shallow = read(depth=2)
    assert shallow.layers == (0, 3)
    assert np.array_equal(shallow.factors[3, "q"][0], node.factors[3, "q"][0])


@pytest.mark.parametrize(
    ("method", "values", "reason"),
    [
        ("local", {}, "with local each device keeps A, B to itself"),
        ("fedsa", {}, "with fedsa each device keeps B to itself"),
        ("heterotune", {}, "maps its own activations into the fleet's common frame"),
        ("h2tune", {}, "with h2tune each device keeps A, B, D to itself"),
        ("fedsb", {"frames": "singular"}, "takes factors out of its own weights"),
    ],
)
def test_a_version_that_is_not_all_of_an_adapter_is_refused(merged, method, values, reason):
    run, read = merged
    run(method, **values)
    with pytest.raises(InputError, match=reason):
        read()


def test_what_is_not_there_is_named(merged, tmp_path, tiny, facts_of):
    run, read = merged
    with pytest.raises(InputError, match="is no node's state"):
        read()
    NodeStore(tmp_path / "node.db").connection.close()
    with pytest.raises(InputError, match="has opened no round, so nothing was learned"):
        read()
    run("fedit")
    with pytest.raises(
        InputError, match=r"has 0 model classes `other`: choose with --class; known: tiny@12ab"
    ):
        read("other")
    with pytest.raises(InputError, match=r"no version 7 of tiny@12ab in .*; versions there: 1"):
        read(version=7)
    with pytest.raises(InputError, match="a slice of 9 layers cannot be cut from a model of 4"):
        read(depth=9)
    with pytest.raises(InputError, match="has the digest 34"):
        of_node.read(tmp_path, lambda _: facts_of(tiny("llama"), model_class="tiny@34"), None, None, None)
    store = NodeStore(tmp_path / "node.db")
    with store.connection:
        store.connection.execute("DELETE FROM reports")
    store.connection.close()
    with pytest.raises(InputError, match="no device has reported how it trains tiny@12ab"):
        read()
    store = NodeStore(tmp_path / "node.db")
    with store.connection:
        store.connection.execute("DELETE FROM versions")
    store.connection.close()
    with pytest.raises(InputError, match="has merged no round, so nothing was learned"):
        read()
