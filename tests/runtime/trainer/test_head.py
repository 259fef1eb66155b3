"""Where rows of a head begin, in real trainer processes: which rows, from which texts, and what travels of them."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_runtime import settings
from edge_runtime.protocol import codec
from edge_runtime.trainer import data

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
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))

    def run(name, start=None, rows=ROWS, **changes):
        fleet = {"head": settings.Head(), "training": STILL, "texts": texts, **codistill, "rounds": 9}
        if start is not None:
            path = tmp_path / f"{name}.start"
            path.write_bytes(codec.encode(start, step=2**-9))
            fleet |= {"start": (str(path),), "round": 2}
        folder, result = trained(name, rows, HELD_OUT, **{**fleet, **changes})
        sent = codec.decode((folder / "payload.bin").read_bytes())
        return folder, result, {key.split(".")[1]: row[0] for key, row in sent.items() if key.endswith(".H")}

    return run


def told(*labels, wrong=0):
    """The fleet's predictions of the public texts, right but for these texts, which are of the next label."""
    words = [row["text"].split()[0] for row in PUBLIC]
    names = [*words[1:], words[0]] if wrong else words
    return {f"anchors.{label}.T": np.float32([[label == name for name in names]]) for label in labels}


def test_a_first_round_begins_with_rows_that_tell_the_devices_labels_apart(begun):
    _, means, rows = begun("means")
    _, zero, still = begun("zero", head=settings.Head(start="zero"))
    assert means.losses[0] < 0.8 * np.log(2) and zero.losses[0] == pytest.approx(np.log(2), rel=1e-4)
    assert rows.keys() == {"red", "green"} == still.keys()
    assert np.linalg.norm(rows["red"]) > 1e3 * np.linalg.norm(still["red"])
    # the version's scores are those of the version
    assert means.evaluation == zero.evaluation
    assert "head" in means.phases and "head" not in zero.phases


def test_a_label_of_the_fleets_predictions_begins_with_a_row_beside_rows_that_stay(begun):
    _, _, first = begun("first")
    version = {f"labels.{label}.H": row[None] for label, row in first.items()}
    accuracy = {}
    for name, wrong in (("right", 0), ("wrong", 1)):
        start = {**version, **told(*COLOURS, wrong=wrong)}
        _, result, sent = begun(name, start=start)
        assert "head" in result.phases
        assert np.linalg.norm(sent["blue"]) > 0.3 * np.linalg.norm(first["red"])
        assert all(np.linalg.norm(sent[label]) < 1e-3 for label in ("red", "green"))
        after = {**start, "labels.blue.H": sent["blue"][None]}
        _, scored, _ = begun(f"{name} after", start=after)
        accuracy[name] = scored.evaluation["all"].accuracy
    assert accuracy["wrong"] < accuracy["right"]


def test_nothing_goes_through_the_model_where_each_row_is_there_or_nothing_shows_a_label(begun):
    version = {f"labels.{label}.H": np.ones((1, 32), np.float32) for label in COLOURS}
    _, there, sent = begun("there", start={**version, **told(*COLOURS)})
    assert "head" not in there.phases and all(np.linalg.norm(row) < 1e-3 for row in sent.values())
    del version["labels.blue.H"]
    silent = {**told("red", "green"), "anchors.blue.T": np.zeros((1, len(PUBLIC)), np.float32)}
    _, unheard, _ = begun("unheard", start={**version, **silent})
    assert "head" not in unheard.phases


def test_a_row_that_begins_is_owed_as_far_as_it_was_rounded(begun):
    folder, _, coarse = begun("coarse", codec=settings.Codec(step=1.5))
    _, _, exact = begun("exact", codec=settings.Codec(step=0.01))
    owed = load_file(folder / "residual.bin")
    for label, row in exact.items():
        assert np.abs(coarse[label] - row).max() > 0.05 * np.abs(row).max()
        np.testing.assert_allclose(
            coarse[label] + owed[f"labels.{label}.H"][0], row, atol=0.02 * np.abs(row).max()
        )


def test_rows_of_text_beside_those_of_labels_are_no_label_s(begun):
    fine = {"codec": settings.Codec(step=0.01)}
    _, _, alone = begun("alone", **fine)
    text = [{"prompt": f"say {n}: ", "completion": f"{n}"} for n in range(6)]
    _, _, mixed = begun("mixed", rows=[*ROWS, *text], **fine)
    for label, row in alone.items():
        np.testing.assert_allclose(mixed[label], row, atol=0.02 * np.abs(row).max())


def test_private_rows_begin_once(begun):
    folder, first, _ = begun("first", head=settings.Head("private"))
    kept = load_file(folder / "state.bin")
    assert "head" in first.phases and all(row.any() for row in kept.values())
    private = {"private": str(folder / "state.bin"), "head": settings.Head("private")}
    folder, second, _ = begun("second", start=told("red", "green"), **private)
    assert "head" not in second.phases
    later = load_file(folder / "state.bin")
    assert all(np.allclose(later[key], row, atol=1e-5) for key, row in kept.items())
    folder, third, _ = begun("third", start=told(*COLOURS), **private)
    assert "head" in third.phases and load_file(folder / "state.bin")["labels.blue.H"].any()
