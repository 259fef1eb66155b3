"""What devices predict of public texts: how the node combines it, and what a device learns from it."""

import json
import types

import msgspec
import numpy as np
import pytest
from jobs import job_of

from edge_runtime import methods, settings
from edge_runtime.aggregator import check, merge, opening
from edge_runtime.errors import InputError
from edge_runtime.methods import codistill
from edge_runtime.methods.interface import Contribution
from edge_runtime.protocol import codec, payload
from edge_runtime.trainer.examples import IGNORED, Example
from edge_runtime.trainer.public import Predictions

PUBLIC, SPEC = settings.Public("public.jsonl", 5), settings.Codistill()
RNG = np.random.default_rng(0)


def said(labels, sharpness, seed, texts=5):
    """A device's probabilities (labels, texts)."""
    logits = sharpness * np.random.default_rng(seed).normal(0, 1, (len(labels), texts))
    p = np.exp(logits) / np.exp(logits).sum(0)
    return {f"anchors.{label}.P": row[None].astype(np.float32) for label, row in zip(labels, p, strict=True)}


def combined(*devices, before=None):
    """What the node makes of (predictions, samples) pairs."""
    return codistill.combined(lambda: (Contribution(before or {}, one, samples) for one, samples in devices))


def reference(*devices):
    """T = Σ w p / Σ n in float64, with w = n (1 - H / log labels)."""
    sums, rows = {}, 0
    for one, samples in devices:
        p = np.concatenate(list(one.values())).astype(np.float64)
        p = np.maximum(p, 1e-6)
        p /= p.sum(0)
        weight = samples * (1 + (p * np.log(p)).sum(0) / np.log(len(p)))
        rows += samples
        for key, value in one.items():
            target = key[:-1] + "T"
            sums[target] = sums.get(target, 0) + weight * value[0].astype(np.float64)
    return {key: value / rows for key, value in sums.items()}


def test_predictions_are_weighted_by_rows_and_by_how_sure_a_device_is():
    devices = [(said("abc", 3, 0), 100), (said("bcd", 1, 1), 40), (said("ad", 2, 2), 7)]
    found, truth = combined(*devices), reference(*devices)
    assert found.keys() == truth.keys() == {f"anchors.{label}.T" for label in "abcd"}
    for key, value in truth.items():
        np.testing.assert_allclose(found[key][0], value, atol=1e-5)


def test_who_is_sure_is_followed_where_another_is_not():
    sure = {
        "anchors.a.P": np.full((1, 5), 0.98, np.float32),
        "anchors.b.P": np.full((1, 5), 0.02, np.float32),
    }
    unsure = {f"anchors.{label}.P": np.full((1, 5), 0.5, np.float32) for label in "cd"}
    found = combined((sure, 1), (unsure, 1))
    assert (found["anchors.a.T"] > 90 * found["anchors.c.T"]).all()
    alone = combined((sure, 1))  # half as many rows, and as much evidence for each
    np.testing.assert_allclose(found["anchors.a.T"], alone["anchors.a.T"] / 2, rtol=1e-6)
    assert (
        sum(combined((unsure, 1)).values()) < 1e-5
    ).all()  # a text that nobody can tell counts for nothing


def test_equal_devices_get_their_own_predictions_and_the_last_rounds_are_replaced():
    one = said("abc", 2, 3)
    before = {key[:-1] + "T": RNG.random((1, 5), dtype=np.float32) for key in one}
    step = combined((one, 3), (one, 50), before=before)
    found = {key: before[key] + change for key, change in step.items()}
    evidence = sum(found.values())
    for key, value in one.items():
        np.testing.assert_allclose(found[key[:-1] + "T"] / evidence, value, atol=1e-4)


def test_what_one_said_who_has_left_goes_on_being_taught():
    first = said("ab", 2, 4)
    before = combined((first, 3), (said("cd", 2, 5), 3))
    step = combined((first, 3), before=before)
    assert step.keys() == {"anchors.a.T", "anchors.b.T"}  # what the others know stays as it is
    for key in step:  # and what is told takes the place of what was
        np.testing.assert_allclose(before[key] + step[key], combined((first, 3))[key], atol=1e-6)


@pytest.mark.parametrize(("votes", "plain"), [("mean", True), ("weighted", False), ("oracle", False)])
def test_the_plain_mean_knows_neither_rows_nor_certainty(votes, plain):
    spec = msgspec.structs.replace(SPEC, votes=votes)
    merge = methods.build(settings.MethodChoice(), settings.Head(), PUBLIC, spec).merges["anchors"]
    devices = [(said("abc", 3, 0), 100), (said("ab", 1, 1), 40)]
    step = merge(lambda: (Contribution({}, one, samples) for one, samples in devices))
    (first, _), (second, _) = devices
    truth = {key[:-1] + "T": (value + second.get(key, 0)) / 2 for key, value in first.items()}
    assert step.keys() == truth.keys()
    assert all(np.allclose(step[key], truth[key], atol=1e-6) for key in truth) is plain


def test_the_true_labels_stay_as_they_are_on_the_node():
    truth = {f"anchors.{label}.P": np.eye(2, dtype=np.float32)[[number]] for number, label in enumerate("ab")}
    step = combined((truth, 30), (truth, 5))
    for key, value in truth.items():
        np.testing.assert_allclose(step[key[:-1] + "T"], value, atol=1e-4)


@pytest.mark.parametrize(
    ("votes", "head", "reason"),
    [
        (
            "oracle",
            "[head]",
            r'votes is "oracle", which needs the labels of the public texts, so it is for studies',
        ),
        ("mean", "", r"votes is 'mean', but has to be weighted without a \[head\]"),
        ("mean", "[head]", None),
    ],
)
def test_a_fleet_has_votes_of_devices_and_of_labels(tmp_path, votes, head, reason):
    path = tmp_path / "fleet.toml"
    path.write_text(
        f'[fleet]\nname = "f"\n[public]\nfile = "a"\n[codistill]\nvotes = "{votes}"\n{head}\n[[catalog]]\nsource = "m"\n'
    )
    if reason is None:
        assert settings.load(path).codistill.votes == votes
    else:
        with pytest.raises(InputError, match=reason):
            settings.load(path)


def test_who_finds_a_text_unlike_its_own_rows_is_not_heard():
    """Both are as sure; what one says is scaled by how like its rows each text is."""
    first = {
        "anchors.a.P": np.full((1, 5), 0.98, np.float32),
        "anchors.b.P": np.full((1, 5), 0.02, np.float32),
    }
    second = {
        "anchors.a.P": np.full((1, 5), 0.02, np.float32),
        "anchors.b.P": np.full((1, 5), 0.98, np.float32),
    }
    like = np.array([[1.0, 1.0, 0.5, 0.01, 0.0]], np.float32)
    found = combined(({key: like * value for key, value in first.items()}, 10), (second, 10))
    heard = like / (like + 1)
    share = found["anchors.a.T"] / (found["anchors.a.T"] + found["anchors.b.T"])
    np.testing.assert_allclose(share, heard * 0.98 + (1 - heard) * 0.02, atol=1e-3)


FLEET = settings.Fleet(
    "f",
    (settings.Model("m"),),
    adapter=settings.Adapter(rank=2),
    head=settings.Head(),
    public=PUBLIC,
    codistill=SPEC,
)


def test_it_gains_its_weight_towards_the_last_round():
    ramps = [codistill.ramp(round_, 6) for round_ in range(1, 7)]
    assert ramps == pytest.approx([np.exp(-5 * (1 - done) ** 2) for done in (0, 0.2, 0.4, 0.6, 0.8, 1)])
    assert codistill.ramp(1, 1) == pytest.approx(np.exp(-5)) and codistill.ramp(2, 2) == 1


def test_targets_are_as_sure_as_the_temperature_has_it_and_count_by_their_evidence():
    told = np.array([[0.3, 0.1, 0.0], [0.02, 0.02, 0.04], [0.0, 0.0, 0.0], [0.9, 0.2, -1e-4]], np.float32)
    shares, targets = codistill.learned(told, 1.0)
    assert list(shares) == pytest.approx([0.4, 0.08, 0.0, 1.0])
    np.testing.assert_allclose(targets[:2], [[0.75, 0.25, 0], [0.25, 0.25, 0.5]], rtol=1e-6)
    assert (targets[2] == 0).all() and targets[3, 2] == 0
    np.testing.assert_allclose(
        codistill.learned(told, 0.5)[1][:2], [[0.9, 0.1, 0], [1 / 6, 1 / 6, 4 / 6]], rtol=1e-6
    )


def test_labels_that_a_device_has_no_rows_of_are_news_to_it():
    told = np.array([[0.3, 0.1, 0.0], [0.0, 0.2, 0.2], [0.0, 0.0, 0.0]], np.float32)
    assert list(codistill.news(told, np.array([False, False, True]))) == pytest.approx([0, 0.5, 0])
    assert list(codistill.news(told, np.array([False, True, True]))) == pytest.approx([0.25, 1, 0])


@pytest.mark.parametrize(("round_", "ramp"), [(1, np.exp(-5)), (6, 1.0)])
def test_labels_that_a_device_has_no_rows_of_count_in_full_from_the_first_round(round_, ramp):
    distils = settings.Codistill(rows=10, weight=3.0, temperature=1.0)
    job = job_of(
        train=True,
        round=round_,
        rounds=6,
        public=settings.Public("", 2),
        codistill=distils,
        facts=None,
        plan=None,
        depths=(),
        data="",
        evaluation={},
    )
    rows = [{"text": "a"}, {"text": "b"}]
    how = types.SimpleNamespace(examples=lambda rows: [Example([1], [], IGNORED) for _ in rows])

    shared = {
        "anchors.met.T": np.array([[0.6, 0.1]], np.float32),
        "anchors.unmet.T": np.array([[0.0, 0.3]], np.float32),
    }
    lesson = Predictions(job, rows, ["met", "unmet"], {"met"}, how).lesson(shared)
    shares = [0.6 * ramp, 0.4 * (0.75 + 0.25 * ramp)]
    assert lesson.shares == pytest.approx(shares, rel=1e-6)
    assert lesson.rows == round(10 * sum(shares)) and lesson.weight == 3.0
    np.testing.assert_allclose(lesson.targets, [[1, 0], [0.25, 0.75]], rtol=1e-6)
    assert Predictions(job, rows, ["met"], {"met"}, how).lesson({}) is None
    oracle = msgspec.structs.replace(distils, votes="oracle")
    asked = msgspec.structs.replace(job, fleet=msgspec.structs.replace(job.fleet, codistill=oracle))
    with pytest.raises(InputError, match=r'votes is "oracle", but the public texts have no labels'):
        Predictions(asked, rows, ["met"], {"met"}, how)


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_it_goes_with_every_method(name):
    alone, with_it = (
        methods.METHODS[name],
        methods.build(settings.MethodChoice(name), settings.Head(), PUBLIC, SPEC),
    )
    assert with_it.merges["anchors"].func is codistill.combined
    assert ("labels" in with_it.merges) is bool(alone.merges)
    assert alone.merges.keys() <= with_it.merges.keys()
    assert with_it.factor("anchors.x.P").exchanged and not with_it.factor("anchors.x.T").exchanged


def update(path, model_class, tensors):
    path.write_bytes(codec.encode(tensors))
    return types.SimpleNamespace(
        manifest=types.SimpleNamespace(model_class=model_class, samples=10), payload=path
    )


@pytest.mark.parametrize("across", [True, False])
def test_predictions_cross_models_or_stay_in_the_class(tmp_path, across):
    fleet = settings.Fleet(
        "f",
        FLEET.catalog,
        adapter=FLEET.adapter,
        head=settings.Head(),
        public=PUBLIC,
        codistill=settings.Codistill(across=across),
    )
    method = methods.of(fleet)
    first = {
        "layers.0.q.B": np.ones((8, 2), np.float32),
        "labels.a.H": np.ones((1, 4), np.float32),
        **said("ab", 2, 0),
    }
    second = {
        "layers.0.q.B": np.ones((9, 2), np.float32),
        "labels.c.H": np.ones((1, 6), np.float32),
        **said("bc", 2, 1),
    }
    updates = [update(tmp_path / "1", "m@1", first), update(tmp_path / "2", "n@1", second)]
    versions = {one.model_class: one for one in merge.merge(updates, {}, fleet, method, 1, tmp_path / "v")}
    published = {of: codec.decode(version.artifact.read_bytes()) for of, version in versions.items()}
    told = {
        of: {key.split(".")[1] for key in state if key.startswith("anchors")}
        for of, state in published.items()
    }
    if across:
        assert told == {"m@1": {"a", "b", "c"}, "n@1": {"a", "b", "c"}, "*": {"a", "b", "c"}}
    else:
        assert told == {"m@1": {"a", "b"}, "n@1": {"b", "c"}}
    heads = {of: {key for key in state if key.startswith("labels")} for of, state in published.items()}
    assert (heads["m@1"], heads["n@1"]) == ({"labels.a.H"}, {"labels.c.H"})


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        ({"anchors.a.P": np.zeros((1, 4), np.float32)}, r"anchors.a.P is \(1, 4\)"),
        ({"anchors.a.T": np.zeros((1, 5), np.float32)}, "does not exchange"),
        ({"labels.a.P": np.zeros((1, 5), np.float32)}, "does not exchange"),
        ({"labels.a\n.H": np.zeros((1, 5), np.float32)}, "does not exchange"),
        ({"labels..H": np.zeros((1, 5), np.float32)}, "does not exchange"),
        ({"labels.a.H": np.zeros((2, 5), np.float32)}, r"labels.a.H is \(2, 5\)"),
        (
            {"labels.a.H": np.ones((1, 5), np.float32), "labels.b.H": np.ones((1, 6), np.float32)},
            r"labels.b.H is \(1, 6\)",
        ),
        ({"anchors.a.P": np.full((1, 5), -0.5, np.float32)}, "anchors.a.P is no probabilities"),
        (
            {key: np.full((1, 5), 0.6, np.float32) for key in ("anchors.a.P", "anchors.b.P")},
            "b.P is no probabilities",
        ),
    ],
)
def test_what_is_no_prediction_or_row_of_a_head_is_refused(delta, reason):
    # under other keys first: the encoder refuses those outside the grammar
    sound = codec.encode({f"labels.{number}.H": value for number, value in enumerate(delta.values())})
    header, sections = payload.read(sound)
    header = msgspec.structs.replace(header, shapes={key: value.shape for key, value in delta.items()})
    with pytest.raises(InputError, match=reason):
        check.check(payload.assemble(header, sections), {}, FLEET, methods.of(FLEET))


def test_a_labels_row_is_as_wide_as_those_of_other_labels_that_the_class_sent():
    known = {"labels.a.H": (1, 8), "layers.0.q.A": (2, 9)}
    assert check.check(
        codec.encode({"labels.b.H": np.ones((1, 8), np.float32)}), known, FLEET, methods.of(FLEET)
    )
    with pytest.raises(InputError, match=r"labels.b.H is \(1, 9\)"):
        check.check(
            codec.encode({"labels.b.H": np.ones((1, 9), np.float32)}), known, FLEET, methods.of(FLEET)
        )


def test_a_stage_that_the_method_has_not_is_refused():
    fleet = settings.Fleet(
        "f", FLEET.catalog, method=settings.MethodChoice("fedadapter"), adapter=settings.Adapter(rank=16)
    )
    for stage, known in ((3, True), (4, False)):
        delta = codec.encode({f"stages.{stage}.q.U": np.ones((16, 16), np.float32)})
        if known:
            check.check(delta, {}, fleet, methods.of(fleet))
        else:
            with pytest.raises(InputError, match="does not exchange"):
                check.check(delta, {}, fleet, methods.of(fleet))


def test_the_nodes_texts_are_checked_before_anything_is_announced(tmp_path):
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{n}", "label": "secret"}) + "\n" for n in range(7)))

    def of(texts):
        return msgspec.structs.replace(FLEET, public=settings.Public(str(file), texts))

    assert len(opening.public_texts(of(0))) == 7
    assert opening.public_texts(of(5)) == [{"text": f"t{n}"} for n in range(5)]
    with pytest.raises(InputError, match=r"texts is 8, but .* has 7 rows"):
        opening.public_texts(of(8))


@pytest.mark.parametrize(("texts", "enough"), [(29, False), (30, True)])
def test_a_node_says_in_words_that_a_fleet_has_few_texts_for_its_labels(tmp_path, caplog, texts, enough):
    public = settings.Public("public.jsonl", texts)
    fleet = msgspec.structs.replace(FLEET, public=public)
    sent = {"labels.a.H": np.ones((1, 4), np.float32), **said("bc", 2, 0, texts=texts)}
    updates = [update(tmp_path / "1", "m@1", sent)]
    after = merge.merge(updates, {}, fleet, methods.of(fleet), 1, tmp_path / "v")
    assert opening.texts_suffice(fleet, after) is enough
    told = [] if enough else ["the fleet has 3 labels and 29 public texts", "give [public] 30 texts or more"]
    assert all(part in caplog.text for part in told) and bool(caplog.text) is not enough
    # where nobody learns labels from texts, it does not matter
    alone = msgspec.structs.replace(fleet, codistill=None, public=None)
    assert opening.texts_suffice(alone, after)


def test_what_is_asked_is_served_without_its_answer_and_messages_only_where_no_head_reads_them(tmp_path):
    file = tmp_path / "given.jsonl"
    turns = [
        {"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")
    ]
    rows = [{"prompt": "p", "completion": "secret"}, {"messages": turns}, {"text": "t"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fleet = msgspec.structs.replace(FLEET, head=None, public=settings.Public(str(file), 3))
    asked = [{"text": "p"}, {"messages": turns[:4]}, {"text": "t"}]
    assert opening.public_texts(fleet) == asked
    with pytest.raises(InputError, match=r"texts is 3, but .* has 2 rows with a text or a prompt"):
        opening.public_texts(msgspec.structs.replace(fleet, head=settings.Head()))
    assert opening.public_texts(msgspec.structs.replace(fleet, public=None)) == []
