"""Deltas of unequal ranks on the node: what is refused, and the version that comes of them."""

import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_runtime import methods, settings
from edge_runtime.adapters.initial import initial
from edge_runtime.aggregator import check, merge
from edge_runtime.errors import InputError
from edge_runtime.methods import frames
from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.round import FLEET as SHARED

HETLORA = methods.METHODS["hetlora"]
FLEET = settings.Fleet(
    "f",
    (settings.Model("m"),),
    method=settings.MethodChoice("hetlora"),
    adapter=settings.Adapter(rank=4, lower=(2,), roles=("q",)),
    seed=3,
)


def payload(rank_a, rank_b, seed=0):
    draw = np.random.default_rng(seed)
    shapes = {"layers.0.q.A": (rank_a, 32), "layers.0.q.B": (48, rank_b)}
    return codec.encode({key: draw.normal(0, 1, shape).astype(np.float32) for key, shape in shapes.items()})


def update(path, content):
    path.write_bytes(content)
    return types.SimpleNamespace(manifest=types.SimpleNamespace(model_class="m@1", samples=5), payload=path)


@pytest.mark.parametrize("rank", [4, 2])
def test_a_delta_of_any_of_the_fleets_ranks_is_taken_whatever_the_others_have(rank):
    known = {"layers.0.q.A": (4, 32), "layers.0.q.B": (48, 4)}
    assert check.check(payload(rank, rank), known, FLEET, HETLORA).keys() == known.keys()


@pytest.mark.parametrize(
    ("ranks", "known", "reason"),
    [
        ((3, 3), {}, r"layers.0.q.A is \(3, 32\) in the delta, but has to be of rank 4 or 2"),
        ((4, 2), {}, r"the delta has factors of ranks \[2, 4\], but one device has one"),
        (
            (2, 2),
            {"layers.0.q.A": (4, 31)},
            r"\(2, 32\) in the delta, but has to be of rank 4 or 2, for a layer 31 wide",
        ),
    ],
)
def test_what_is_of_no_rank_or_another_width_is_refused(ranks, known, reason):
    with pytest.raises(InputError, match=reason):
        check.check(payload(*ranks), known, FLEET, HETLORA)


@pytest.mark.parametrize("shape", [(), (1,), (32,), (2, 32), (1, 32, 1)])
def test_a_first_label_whose_row_is_no_row_is_refused(shape):
    fleet = settings.Fleet("f", (settings.Model("m"),), head=settings.Head())
    content = codec.encode({"labels.red.H": np.zeros(shape, np.float32)})
    with pytest.raises(
        InputError, match=r"labels.red.H is \(.*\) in the delta, but has to be as the fleet has it"
    ):
        check.check(content, {}, fleet, methods.of(fleet))


def test_the_version_has_the_fleets_rank_and_goes_on_from_the_last(tmp_path):
    low = [update(tmp_path / "low", payload(2, 2))]
    (first,) = merge.merge(low, {}, FLEET, HETLORA, 1, tmp_path / "1")
    after = load_file(first.master)
    sent = codec.decode(low[0].payload.read_bytes())
    start = initial("layers.0.q.A", (4, 32), 3, HETLORA.factors["A"])
    np.testing.assert_allclose(after["layers.0.q.A"][:2], start[:2] + sent["layers.0.q.A"], atol=1e-6)
    assert np.array_equal(after["layers.0.q.A"][2:], start[2:])  # nobody holds it: it waits for who does
    assert after["layers.0.q.B"].shape == (48, 4)

    both = [*low, update(tmp_path / "high", payload(4, 4, seed=1))]
    (second,) = merge.merge(both, {"m@1": first}, FLEET, HETLORA, 2, tmp_path / "2")
    assert np.abs(load_file(second.master)["layers.0.q.A"][2:]).mean() > 0.1


def test_the_row_of_a_label_that_nobody_was_shown_stays(tmp_path):
    fleet = settings.Fleet("f", (settings.Model("m"),), head=settings.Head())
    draw = np.random.default_rng(0)
    red, blue, more = draw.normal(0, 1, (3, 1, 32)).astype(np.float32)
    both = update(tmp_path / "both", codec.encode({"labels.red.H": red, "labels.blue.H": blue}))
    (first,) = merge.merge([both], {}, fleet, methods.of(fleet), 1, tmp_path / "1")
    red_alone = update(tmp_path / "red", codec.encode({"labels.red.H": more}))
    (second,) = merge.merge([red_alone], {"m@1": first}, fleet, methods.of(fleet), 2, tmp_path / "2")
    before, after = load_file(first.master), load_file(second.master)
    assert np.array_equal(after["labels.blue.H"], before["labels.blue.H"])
    assert np.abs(after["labels.red.H"] - before["labels.red.H"]).mean() > 0.1


def test_a_class_keeps_the_features_that_it_joined_with_whoever_sends_others(tmp_path):
    fleet = settings.Fleet(
        "f", (settings.Model("m"),), head=settings.Head(shared="fleet"), public=settings.Public("p.jsonl", 40)
    )
    method, versions, draw = methods.of(fleet), {}, np.random.default_rng(0)
    for round_, model_class in enumerate(("m@1", "m@1", "m@2"), 1):
        features = frames.features(draw.normal(size=(40, 64)).astype(np.float32))
        sent = update(tmp_path / "sent", codec.encode({frames.SENT: features}))
        sent.manifest.model_class = model_class
        written = merge.merge([sent], versions, fleet, method, round_, tmp_path / str(round_))
        versions |= {version.model_class: version for version in written}
        masters = {name: load_file(version.master) for name, version in versions.items()}
        if round_ == 1:
            before = masters
    assert np.array_equal(masters["m@1"][frames.SENT], before["m@1"][frames.SENT])
    assert frames.fault(masters["m@1"][frames.SENT]) is None
    made = frames.common([masters[name][frames.SENT] for name in ("m@1", "m@2")], before[SHARED][frames.MADE])
    assert np.array_equal(masters[SHARED][frames.MADE], made)


def test_a_class_that_joins_takes_nothing_from_the_answers_of_the_others(tmp_path):
    fleet = settings.Fleet(
        "f",
        (settings.Model("m"),),
        method=settings.MethodChoice("heterotune"),
        public=settings.Public("p.jsonl", 40),
        codistill=settings.Codistill(),
    )
    method, draw = methods.of(fleet), np.random.default_rng(0)
    said = [completion.Completion(0, "yes", 0.5)]
    features, speaks = (tmp_path / name for name in ("features", "speaks"))
    X = frames.features(draw.normal(size=(40, 8)).astype(np.float32))
    joins = update(features, codec.encode({frames.SENT: X}))
    joins.manifest.model_class = "n@1"
    answers = update(speaks, codec.encode({}, completion.encode(said)))

    def told(updates, versions, round_):
        written = merge.merge(updates, versions, fleet, method, round_, tmp_path / str(round_))
        versions |= {version.model_class: version for version in written}
        assert completion.decode(codec.answers(versions["m@1"].artifact.read_bytes())) == said
        return versions

    versions = told([answers, joins], {}, 1)
    told([joins], versions, 2)  # and the last answers stay where nobody was asked
