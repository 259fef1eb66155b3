"""Versions as differences: what devices start from follows the node's master, round after round."""

import types

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_runtime import methods, settings
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator import merge
from edge_runtime.aggregator.publish import LONGEST_CHAIN
from edge_runtime.aggregator.store import NodeStore
from edge_runtime.protocol import codec

SHAPES = {"layers.0.q.A": (8, 200), "layers.0.q.B": (100, 8), "labels.red.H": (1, 64)}
CLASS = "m@1"


def fleet_of(method="fedit", **values):
    return settings.Fleet(
        "f",
        (settings.Model("m"),),
        rounds=20,
        method=settings.MethodChoice(method, values),
        adapter=settings.Adapter(rank=8, roles=("q",)),
        head=settings.Head(),
        seed=3,
    )


class Run:
    """A node without a link, and the deltas that its devices send."""

    def __init__(self, folder, fleet):
        self.folder, self.fleet, self.method = folder, fleet, methods.of(fleet)
        self.draw, self.versions, self.round = np.random.default_rng(0), {}, 0

    def merge(self, *shapes, of=CLASS):
        """One round in which a device sends a normal delta in tensors of each of these shapes."""
        deltas = [
            {key: self.draw.normal(0, 1, shape).astype(np.float32) for key, shape in each.items()}
            for each in shapes
        ]
        return self.merge_payloads(map(codec.encode, deltas), of)

    def merge_payloads(self, payloads, of=CLASS):
        """One round of these encoded deltas."""
        self.round += 1
        updates = []
        for number, content in enumerate(payloads):
            payload = self.folder / f"{self.round}-{number}"
            payload.write_bytes(content)
            manifest = types.SimpleNamespace(model_class=of, samples=5)
            updates.append(types.SimpleNamespace(manifest=manifest, payload=payload))
        merged = merge.merge(updates, self.versions, self.fleet, self.method, self.round, self.folder / "v")
        self.versions |= {version.model_class: version for version in merged}
        return self.versions[of]

    def state(self, version):
        return published(version.chain, self.fleet.seed, self.method)


@pytest.fixture
def run(tmp_path):
    return lambda fleet=None: Run(tmp_path, fleet or fleet_of())


def off(state, master):
    """What devices have is off by, of a standard normal delta."""
    return {key: float(np.sqrt(np.square(state[key] - value).mean())) for key, value in master.items()}


def test_what_is_rounded_off_a_version_does_not_add_up(run):
    node = run()
    lengths, bits, naive = [], [], {}
    before = None
    for _ in range(2 * LONGEST_CHAIN + 1):
        version = node.merge(SHAPES)
        master = load_file(version.master)
        assert max(off(node.state(version), master).values()) < 0.5
        lengths.append(len(version.chain))
        size = sum(value.size for value in master.values())
        bits.append(8 * version.artifact.stat().st_size / size)
        # without feedback: each version's own change, rounded
        if before is not None:
            step = codec.encode({key: master[key] - before[key] for key in master}, step=1.5)
            naive = {key: naive.get(key, 0) + value for key, value in codec.decode(step).items()}
        else:
            naive = node.state(version)
        before = master
    assert lengths == [*range(1, LONGEST_CHAIN + 1)] * 2 + [1]
    whole = (LONGEST_CHAIN, 2 * LONGEST_CHAIN)
    assert max(bits[number] for number in range(len(bits)) if number not in whole) < 2.7  # with a header
    assert min(bits[number] for number in whole) > 6.5
    assert min(off(naive, before).values()) > 1  # the twin: it walks away


def test_a_whole_state_leaves_little_for_the_next_differences_to_mend(run):
    node = run()
    for _ in range(LONGEST_CHAIN + 1):
        version = node.merge(SHAPES)
    assert len(version.chain) == 1
    assert max(off(node.state(version), load_file(version.master)).values()) < 0.05


def test_layers_and_labels_that_come_later_join_the_chain(run):
    node = run()
    node.merge(SHAPES)
    later = {"layers.7.q.A": (8, 200), "labels.blue.H": (1, 64)}
    version = node.merge(SHAPES, later)
    assert len(version.chain) == 2
    state, master = node.state(version), load_file(version.master)
    assert state.keys() == master.keys() == SHAPES.keys() | later.keys()
    assert max(off(state, master).values()) < 0.5
    # a round without them sends what was rounded off of them
    rest = node.merge(SHAPES)
    assert (
        off(node.state(rest), load_file(rest.master))["layers.7.q.A"]
        < 0.6 * off(state, master)["layers.7.q.A"]
    )


def test_a_class_that_nobody_trained_keeps_its_version(run):
    node = run()
    first = node.merge(SHAPES)
    node.merge(SHAPES, of="n@1")
    assert node.versions[CLASS] == first
    late = node.merge(
        {key: (8, 150) if key.endswith("A") else shape for key, shape in SHAPES.items()}, of="o@1"
    )
    assert len(late.chain) == 1
    assert max(off(node.state(late), load_file(late.master)).values()) < 0.05  # a first version after round 1


def test_what_the_fleet_shares_is_in_every_class_s_chain(run):
    node = run(fleet_of("fedsb", stages=2, across=True))
    core = {"stages.1.q.C": (8, 8)}
    for of in (CLASS, "n@1", CLASS):
        node.merge(core, of=of)
    shared = load_file(node.versions["*"].master)
    for name, version in node.versions.items():
        assert max(off(node.state(version), shared).values()) < 0.5, name
    assert {name: len(version.chain) for name, version in node.versions.items()} == {
        CLASS: 3,
        "n@1": 2,
        "*": 3,
    }


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_factors_that_are_made_anew_each_round_travel_in_a_fine_step(run, method):
    node = run(fleet_of(method))
    layers = {key: shape for key, shape in SHAPES.items() if key.startswith("layers")}
    for _ in range(3):
        version = node.merge(layers)
        state, master = node.state(version), load_file(version.master)
        for key, value in master.items():
            assert np.linalg.norm(state[key] - value) < 0.02 * np.linalg.norm(value)


def test_a_merge_that_is_repeated_after_a_kill_makes_the_same_version(run):
    node = run()
    node.merge(SHAPES)
    before, draw = dict(node.versions), node.draw.bit_generator.state
    first = node.merge(SHAPES)
    contents = [path.read_bytes() for path in (first.master, *first.chain)]
    node.versions, node.round, node.draw.bit_generator.state = before, 1, draw
    again = node.merge(SHAPES)
    assert again == first and contents == [path.read_bytes() for path in (again.master, *again.chain)]


def test_a_version_that_is_kept_has_its_whole_chain(run, tmp_path):
    node = run()
    store = NodeStore(tmp_path / "node.db")
    for round_ in range(1, 2 * LONGEST_CHAIN + 3):
        store.merged(round_, [node.merge({"labels.red.H": (1, 8)})])
        assert store.versions() == node.versions
        store.forget_versions(round_ - 3)
        for version in store.kept_versions()[CLASS].values():
            assert all(path.exists() for path in (version.master, *version.chain))
    kept = store.kept_versions()[CLASS]
    # of the last three, the oldest is the last of the second chain
    assert [*kept] == [*range(LONGEST_CHAIN + 1, 2 * LONGEST_CHAIN + 3)]
    assert len([*(tmp_path / "v").iterdir()]) == 2 * len(kept)
    store.forget_versions(100)
    assert [*store.kept_versions()[CLASS]] == [2 * LONGEST_CHAIN + 1, 2 * LONGEST_CHAIN + 2]
    store.connection.close()


def left_to_learn(folder, step, feedback=True):
    """Two devices with rows of their own fit a matrix in twelve rounds; the version's excess loss at the end.

    As a share of the loss of version 0. feedback: whether devices send what rounding lost later.
    """
    folder.mkdir()
    key, draw = "layers.0.q.B", np.random.default_rng(0)
    node = Run(folder, msgspec.structs.replace(fleet_of(), codec=settings.Codec(step)))
    rows = [draw.normal(0, scale, (60, 8)) for scale in (1.0, 0.5)]
    truth = draw.normal(0, 1, (100, 8))
    answers = [part @ truth.T + draw.normal(0, 0.1, (60, 100)) for part in rows]
    owed = [np.zeros((100, 8), np.float32) for _ in rows]
    start = np.zeros((100, 8), np.float32)
    for _ in range(12):
        sent = []
        for number, (part, answer) in enumerate(zip(rows, answers, strict=True)):
            trained = start.astype(float)
            for _ in range(5):
                trained -= 0.1 * (trained @ part.T - answer.T) @ part / len(part)
            delta = (trained - start).astype(np.float32) + feedback * owed[number]
            sent.append(codec.encode({key: delta}, step=step))
            owed[number] = delta - codec.decode(sent[-1])[key]
        start = node.state(node.merge_payloads(sent))[key]
    both, every = np.concatenate(rows), np.concatenate(answers)

    def loss(matrix):
        return float(np.square(both @ matrix.T - every).mean())

    best = np.linalg.lstsq(both, every)[0].T
    return (loss(start) - loss(best)) / (loss(np.zeros_like(start)) - loss(best))


def test_a_fleet_learns_as_much_in_1_6_bits_as_in_8(tmp_path):
    fine, coarse = left_to_learn(tmp_path / "8", 0.016), left_to_learn(tmp_path / "1.6", 1.5)
    alone = left_to_learn(tmp_path / "no feedback", 1.5, feedback=False)
    assert coarse < 1.2 * fine < 0.01
    assert alone > 2 * fine
