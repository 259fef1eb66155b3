"""Where rows of a head begin: which rows, from which inputs; and in real trainer processes, what travels of them."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from edge_runtime import settings
from edge_runtime.adapters import attach
from edge_runtime.methods import fedit
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import parse
from edge_runtime.protocol.plan import Plan
from edge_runtime.trainer import data, head
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.examples import IGNORED, Example
from edge_runtime.trainer.lesson import Distillation
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.states import last_states

# --- which rows begin


def reading(label, count, seed=0):
    """Examples of a head's label, each of which ends with the same token."""
    draw = np.random.default_rng(100 * seed + label)
    return [Example([*draw.integers(3, 60, 5).tolist(), 70 + label], [], label) for _ in range(count)]


OWN = [*reading(0, 6), *reading(1, 6)]
TEXTS = [text for label in range(3) for text in reading(label, 6, seed=1)]
TRUTH = np.repeat(np.eye(3, dtype=np.float32), 6, 0)


def lesson(targets, evidence):
    return Distillation(TEXTS, evidence, [1.0] * len(TEXTS), torch.from_numpy(targets), 1.0, 4)


@pytest.fixture
def begin(tiny):
    """begin(examples, lesson, rows, start): the head of three labels that began with these rows, and whether texts were read."""

    def run(examples, told=None, rows=(), start="all"):
        model = tiny("llama", initializer_range=0.3)
        adapter = attach.attach(model, (0, 1, 2, 3), settings.Adapter(rank=2), fedit.METHOD, seed=0)
        version = torch.zeros(3, model.config.hidden_size)
        for label, row in rows:
            version[label] = row
        adapter = adapter._replace(labels=("a", "b", "c"), head=nn.Parameter(version))
        plan = Plan("m", "m@1", 4, 4, "float32", 2, 8, 32, terms={}, step_seconds=1.0)
        base, meter = Base(model, adapter, plan), Meter("cpu", lambda _: None)
        head.begin(base, examples, told, settings.Head(start=start), meter)
        return adapter.head.detach(), "head" in meter.phases

    return run


def test_own_rows_and_predictions_show_labels_and_rows_that_are_there_stay(begin):
    first, read = begin(OWN)
    assert read and first[:2].any(1).all() and not first[2].any()
    told = lesson(TRUTH, np.full(len(TEXTS), 0.3))
    second, read = begin(OWN, told, rows=[(0, first[0]), (1, first[1])])
    assert read and torch.equal(second[:2], first[:2])
    assert 0.2 < float(second[2].norm() / first[0].norm()) < 5
    other, _ = begin(OWN, lesson(np.roll(TRUTH, 6, 0), told.evidence), rows=[(0, first[0]), (1, first[1])])
    cosine = torch.cosine_similarity(second[2], other[2], dim=0)
    assert float(cosine) < 0.5  # a wrong lesson begins elsewhere


def test_nothing_goes_through_the_model_where_no_row_begins(begin):
    row = torch.ones(32)
    silent = lesson(TRUTH, np.repeat([0.5, 0.5, 0.0], 6))  # of no text of the third label there is evidence
    everywhere = lesson(TRUTH, np.ones(len(TEXTS)))
    assert not begin(OWN, silent, rows=[(0, row), (1, row)])[1]
    assert not begin(OWN, everywhere, rows=[(0, row), (1, row), (2, row)])[1]
    assert begin(OWN, everywhere, rows=[(0, row), (1, row)])[1]


def test_rows_begin_only_where_a_label_lacks_its_row_that_the_setting_names(begin):
    row, everywhere = torch.ones(32), lesson(TRUTH, np.ones(len(TEXTS)))
    assert not begin(OWN, start="unseen")[1]  # all labels are of own rows
    assert begin(OWN, everywhere, rows=[(0, row), (2, row)], start="unseen")[1]  # the class's first examples
    assert begin(OWN, everywhere, rows=[(0, row), (2, row)], start="all")[1]
    assert begin(OWN, everywhere, rows=[(0, row), (1, row)], start="unseen")[1]
    # a device that joins a fleet with predictions has no rows: all begin, in one size
    late, _ = begin(OWN, everywhere, start="unseen")
    assert late.any(1).all() and torch.equal(late, begin(OWN, everywhere)[0])
    zero, read = begin(OWN, everywhere, start="zero")
    assert not read and not zero.any()


def test_rows_of_text_beside_those_of_labels_are_no_label_s(begin):
    text = [Example([5, 6, 7, 8], [IGNORED, 6, 7, 8])] * 5
    alone, mixed = begin(OWN)[0], begin([*text, *OWN])[0]
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-4)
    assert not begin(text)[1]  # a device without labelled rows


# --- which rows are made anew after the steps


@pytest.fixture
def renew(tiny):
    """renew(lesson, heard): the head of three labels whose rows were drawn, and the third label's logits."""
    model = tiny("llama", initializer_range=0.3)
    adapter = attach.attach(model, (0, 1, 2, 3), settings.Adapter(rank=2), fedit.METHOD, seed=0)
    rows = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plan = Plan("m", "m@1", 4, 4, "float32", 2, 8, 32, terms={}, step_seconds=1.0)
    states = last_states(Base(model, adapter, plan), OWN + TEXTS)

    def run(told, heard="c"):
        renewed = adapter._replace(
            labels=("a", "b", "c"), heard=frozenset(heard), head=nn.Parameter(rows.clone())
        )
        head.renew(renewed, OWN, states, told)
        return renewed.head.detach(), renewed.logits(states).detach()[:, 2]

    return rows, run


def test_a_row_without_examples_is_made_anew_of_the_newest_predictions_and_no_other(renew):
    rows, run = renew
    after, logits = run(lesson(TRUTH, np.full(len(TEXTS), 0.3)))
    assert torch.equal(after[:2], rows[:2])
    assert logits[-6:].mean() > 2 * logits[:-6].abs().mean()  # the texts of the third label
    wrong, _ = run(lesson(np.roll(TRUTH, 6, 0), np.full(len(TEXTS), 0.3)))
    assert float(torch.cosine_similarity(after[2], wrong[2], dim=0)) < 0.5
    # the sizes of logits are those of own rows' labels, however small the row was
    sizes = after.norm(dim=1)
    assert 0.2 < float(sizes[2] / sizes[:2].mean()) < 5


def test_a_row_stays_of_which_there_is_no_evidence_or_that_the_class_has_learned_from_examples(renew):
    rows, run = renew
    silent = lesson(TRUTH, np.repeat([0.5, 0.5, 0.0], 6))
    assert torch.equal(run(silent)[0], rows)
    assert torch.equal(run(lesson(TRUTH, np.ones(len(TEXTS))), heard="")[0], rows)


# --- in a round

COLOURS = ("red", "green", "blue")
ROWS = [{"text": f"{word} {n}", "label": word} for n in range(6) for word in ("red", "green")]
HELD_OUT = [{"text": f"{word} {n}", "label": word} for n in range(6, 9) for word in COLOURS]
PUBLIC = [{"text": f"{word} {n}"} for n in range(10, 14) for word in COLOURS]
# a step that changes next to nothing: what is sent is the start
STILL = settings.Training(steps=1, rows_a_step=8, learning_rate=1e-9, max_tokens=32)


@pytest.fixture
def begun(trained, tmp_path):
    """begun(name, **changes): a job of one such step; its folder, its result, and the rows of the head it sends."""
    codistill = {"public": settings.Public("", len(PUBLIC)), "codistill": settings.Codistill(rows=6)}
    every = settings.Head(start="all")
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))

    def run(name, start=None, **changes):
        fleet = {"head": every, "training": STILL, "texts": texts, **codistill, "rounds": 9}
        if start is not None:
            path = tmp_path / f"{name}.start"
            path.write_bytes(codec.encode(start, step=2**-9))
            fleet |= {"start": (str(path),), "round": 2}
        folder, result = trained(name, ROWS, HELD_OUT, **{**fleet, **changes})
        sent = codec.decode((folder / "payload.bin").read_bytes())
        return (
            folder,
            result,
            {key.split(".")[1]: row[0] for key, row in sent.items() if parse(key).kind == "labels"},
        )

    return run


def told(*labels):
    """The fleet's predictions of the public texts, which are right."""
    words = [row["text"].split()[0] for row in PUBLIC]
    return {f"anchors.{label}.T": np.float32([[label == word for word in words]]) for label in labels}


def test_a_first_round_begins_with_rows_which_travel_whole_and_are_owed_as_far_as_they_are_rounded(begun):
    folder, means, coarse = begun("all", codec=settings.Codec(step=1.5))
    _, zero, still = begun("zero", head=settings.Head(start="zero"))
    _, _, exact = begun("exact", codec=settings.Codec(step=0.01))
    assert means.losses[0] < 0.8 * np.log(2) and zero.losses[0] == pytest.approx(np.log(2), rel=1e-4)
    assert coarse.keys() == {"red", "green"} == still.keys()
    assert means.evaluation == zero.evaluation  # of the version, which has no rows
    owed = load_file(folder / "residual.bin")
    for label, row in exact.items():
        assert np.linalg.norm(row) > 1e3 * np.linalg.norm(still[label])
        assert np.abs(coarse[label] - row).max() > 0.05 * np.abs(row).max()
        whole = coarse[label] + owed[f"labels.{label}.H"][0]
        np.testing.assert_allclose(whole, row, atol=0.02 * np.abs(row).max())


def test_a_label_of_the_fleets_predictions_alone_travels_with_its_row_and_is_told_from_others(begun):
    _, _, first = begun("first")
    start = {**{f"labels.{label}.H": row[None] for label, row in first.items()}, **told(*COLOURS)}
    _, before, sent = begun("second", start=start)
    assert all(np.linalg.norm(sent[label]) < 1e-3 for label in first)
    _, after, _ = begun("third", start={**start, "labels.blue.H": sent["blue"][None]})
    assert before.evaluation["all"].accuracy <= 2 / 3 < after.evaluation["all"].accuracy
    assert "head" in before.phases and "head" not in after.phases


def test_a_row_without_examples_is_made_anew_in_each_round_where_rows_have_a_closed_form(begun):
    _, _, first = begun("first")
    start = {f"labels.{label}.H": row[None] for label, row in first.items()} | told(*COLOURS)
    useless = start["labels.red.H"]  # as the row of blue
    _, _, renewed = begun("renewed", start={**start, "labels.blue.K": useless}, head=settings.Head())
    _, _, zero = begun("zero", start={**start, "labels.blue.K": useless}, head=settings.Head(start="zero"))
    _, _, learned = begun("learned", start={**start, "labels.blue.H": useless}, head=settings.Head())
    assert np.linalg.norm(renewed["blue"]) > 0.5 * np.linalg.norm(first["red"])
    assert np.linalg.norm(zero["blue"]) < 1e-3 * np.linalg.norm(renewed["blue"])
    # a device of the class has examples of blue
    assert np.linalg.norm(learned["blue"]) < 1e-3 * np.linalg.norm(renewed["blue"])
    assert all(np.linalg.norm(renewed[label]) < 1e-3 for label in first)


def test_private_rows_begin_once(begun):
    folder, first, _ = begun("first", head=settings.Head("private", start="all"))
    kept = load_file(folder / "state.bin")
    assert "head" in first.phases and all(row.any() for row in kept.values())
    private = {"private": str(folder / "state.bin"), "head": settings.Head("private", start="all")}
    folder, second, _ = begun("second", start=told(*COLOURS), **private)
    later = load_file(folder / "state.bin")
    assert "head" in second.phases and later["labels.blue.K"].any()
    assert all(np.allclose(later[key], row, atol=1e-5) for key, row in kept.items())
