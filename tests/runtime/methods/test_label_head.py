"""A head over labels in a real trainer, what it learns from public texts, and the parts of a step."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edge_runtime import settings
from edge_runtime.protocol import codec
from edge_runtime.trainer import data
from edge_runtime.trainer.examples import IGNORED, Example
from edge_runtime.trainer.states import likeness
from edge_runtime.trainer.step import cut

ROWS = [{"text": f"{word} {n}", "label": word} for n in range(6) for word in ("red", "green")]
HELD_OUT = [{"text": f"{word} {n}", "label": word} for n in range(6, 9) for word in ("red", "green", "blue")]
PUBLIC = [{"text": f"{word} {n}"} for n in range(10, 14) for word in ("red", "green", "blue")]
CODISTILL = {"public": settings.Public("", len(PUBLIC)), "codistill": settings.Codistill(rows=6)}


@pytest.fixture
def trained(trained):
    """trained(name, **changes): one job of a device with a head."""

    def run(name, rows=ROWS, **changes):
        return trained(name, rows, HELD_OUT, **{"head": settings.Head(), **changes})

    return run


def version(folder, path):
    """What a node with this device alone publishes; version 0's A is left out, as nothing here reads it."""
    delta = codec.decode((folder / "payload.bin").read_bytes())
    path.write_bytes(codec.encode({key: value for key, value in delta.items() if key.startswith("labels")}))
    return (str(path),)


def test_labels_are_learned_by_a_row_each_and_one_that_the_head_lacks_is_missed(trained, tmp_path):
    folder, first = trained("first", head=settings.Head(start="zero"))
    assert first.losses[-1] < 0.7 * first.losses[0]
    assert first.losses[0] == pytest.approx(np.log(2), rel=1e-3)
    sent = codec.decode((folder / "payload.bin").read_bytes())
    assert {key for key in sent if key.startswith("labels")} == {"labels.red.H", "labels.green.H"}
    start = version(folder, tmp_path / "start")
    _, second = trained("second", train=False, start=start)
    assert (
        1 / 3 < second.evaluation["all"].accuracy <= 2 / 3
    )  # better than one answer for all, and blue is missed
    assert second.evaluation["all"].rows == 9


def test_a_private_head_stays_on_the_device(trained):
    folder, _ = trained("private", head=settings.Head("private"))
    kept, sent = (load_file(folder / "state.bin"), codec.shapes((folder / "payload.bin").read_bytes()))
    assert kept.keys() == {"labels.red.H", "labels.green.H"}
    assert not any(key.startswith("labels") for key in sent)


@pytest.mark.parametrize("predicted", [False, True])
def test_rows_of_labels_that_a_device_was_not_shown_are_not_sent(trained, tmp_path, predicted):
    """Nor are they owed; the fleet's predictions show them too."""
    version = {f"labels.{label}.H": np.ones((1, 32), np.float32) for label in ("red", "blue")}
    told = {"anchors.blue.T": np.ones((1, len(PUBLIC)), np.float32)} if predicted else {}
    (tmp_path / "start").write_bytes(codec.encode({**version, **told}))
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC)) if predicted else None
    codistill = CODISTILL if predicted else {}
    folder, _ = trained("foreign", start=(str(tmp_path / "start"),), texts=texts, **codistill)
    shown = {"red", "green", "blue"} if predicted else {"red", "green"}
    for sent in (codec.decode((folder / "payload.bin").read_bytes()), load_file(folder / "residual.bin")):
        assert {key for key in sent if key.startswith("labels")} == {f"labels.{label}.H" for label in shown}


def test_without_a_head_labels_are_learned_as_text(trained):
    folder, result = trained("text", head=None)
    assert result.losses[0] > 1.5 * np.log(2)
    assert not any(key.startswith("labels") for key in codec.shapes((folder / "payload.bin").read_bytes()))


def test_what_a_device_says_adds_up_to_how_like_its_rows_a_text_is(trained, tmp_path):
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))
    folder, _ = trained("says", method=settings.MethodChoice("local"), texts=texts, **CODISTILL)
    said = codec.decode((folder / "payload.bin").read_bytes())
    assert {key: value.shape for key, value in said.items()} == {
        f"anchors.{label}.P": (1, 12) for label in ("green", "red")
    }
    total = sum(said.values())[0]
    assert (total > 0).all() and (total <= 1.02).all()
    assert not any(key.startswith("anchors") for key in load_file(folder / "state.bin"))
    assert load_file(folder / "residual.bin") == {}  # nothing is owed of it


def test_the_controls_say_the_plain_prediction_and_the_truth(trained, tmp_path):
    labelled = [{**row, "label": row["text"].split()[0]} for row in PUBLIC]
    texts = str(data.write_rows(tmp_path / "public.jsonl", labelled))
    training, sent = settings.Training(steps=1, rows_a_step=2, max_tokens=32), {}
    for votes in ("mean", "oracle"):
        spec = {**CODISTILL, "codistill": settings.Codistill(rows=6, votes=votes)}
        method = settings.MethodChoice("local")
        folder, _ = trained(votes, method=method, texts=texts, training=training, **spec)
        sent[votes] = codec.decode((folder / "payload.bin").read_bytes())
    assert sent["mean"].keys() == {f"anchors.{label}.P" for label in ("green", "red")}
    np.testing.assert_allclose(sum(sent["mean"].values()), 1, atol=0.02)  # no likeness to own rows in it
    truth = {
        f"anchors.{label}.P": np.float32([[row["label"] == label for row in labelled]])
        for label in ("red", "green", "blue")
    }
    assert sent["oracle"].keys() == truth.keys()
    for key, value in truth.items():
        np.testing.assert_allclose(sent["oracle"][key], value, atol=0.01)


def test_a_label_is_learned_from_what_the_fleet_says_of_public_texts(trained, tmp_path):
    """With targets that are right about blue the device that never saw it tells it apart; without them it cannot."""
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))
    told = {
        f"anchors.{label}.T": np.array(
            [[float(label == row["text"].split()[0]) for row in PUBLIC]], np.float32
        )
        for label in ("red", "green", "blue")
    }
    (tmp_path / "start").write_bytes(codec.encode(told))
    training = settings.Training(steps=40, rows_a_step=8, learning_rate=2e-2, max_tokens=32)
    fleet = {"method": settings.MethodChoice("local"), **CODISTILL, "round": 2, "rounds": 2}
    common = {**fleet, "texts": texts, "training": training}
    accuracy = {}
    for name, start in (("taught", {"start": (str(tmp_path / "start"),)}), ("alone", {})):
        folder, _ = trained(name, **common, **start)
        private = str(folder / "state.bin")
        _, after = trained(f"{name} after", train=False, private=private, **common, **start)
        accuracy[name] = after.evaluation["all"].accuracy
    assert accuracy["alone"] <= 2 / 3 < accuracy["taught"]


def test_a_device_without_labels_takes_part_with_what_it_has(trained, tmp_path):
    rows = [{"prompt": f"say {n}: ", "completion": f"{n}"} for n in range(12)]
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC))
    folder, result = trained("prompts", rows=rows, texts=texts, **CODISTILL)
    assert result.losses[-1] < result.losses[0]
    assert {key.split(".")[0] for key in codec.shapes((folder / "payload.bin").read_bytes())} == {"layers"}


@pytest.mark.parametrize("label", ["x" * 81, "two\nlines"])
def test_a_label_that_cannot_be_exchanged_is_refused_before_training(trained, label):
    with pytest.raises(AssertionError, match="has to be 1 to 80 characters"):
        trained("long", rows=[{"text": "a", "label": label}])


def test_too_few_public_texts_are_refused_in_a_sentence(trained, tmp_path):
    texts = str(data.write_rows(tmp_path / "public.jsonl", PUBLIC[:3]))
    with pytest.raises(AssertionError, match="has 12 public texts, but its file has 3 rows"):
        trained("few", texts=texts, **CODISTILL)


# --- the parts of a step


def rows_of(*kinds):
    """An example a kind: "t" text with 3 labelled tokens, "h" a head's row, "?" one whose label the head lacks."""
    made = {
        "t": Example([1, 2, 3, 4], [IGNORED, 2, 3, 4]),
        "h": Example([1, 2], [], 0),
        "?": Example([1, 2], [], IGNORED),
    }
    return [made[kind] for kind in kinds]


@pytest.mark.parametrize("kinds", ["tttt", "hhhh", "tthhh", "h??", "tth?"])
@pytest.mark.parametrize("micro_rows", [1, 2, 100])
def test_the_parts_of_a_step_weigh_one_whatever_they_are_cut_into(kinds, micro_rows):
    found = cut(rows_of(*kinds), rows_of("h", "h", "h"), 0.5, micro_rows)
    assert sum(part.share for part in found if not part.public) == pytest.approx(1)
    assert sum(part.share for part in found if part.public) == pytest.approx(0.5)
    assert all(len({row.answer is None for row in part.rows}) == 1 for part in found)
    assert sum(len(part.rows) for part in found) == len(kinds) + 3


def test_text_weighs_by_labelled_tokens_and_a_heads_rows_by_those_it_knows():
    found = cut([*rows_of("t", "h", "?"), Example([1, 2], [IGNORED, 2])], [], 0.0, 1)
    shares = sorted(part.share for part in found)
    assert shares == pytest.approx([0, 0.5 * 1 / 4, 0.5 * 3 / 4, 0.5])


# --- how like a device's rows a text is


def test_likeness_is_the_share_of_rows_that_lie_no_closer():
    draw = np.random.default_rng(0)
    own, texts = draw.normal(0, 1, (40, 6)), draw.normal(0, 1, (9, 6))
    own, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (own, texts))
    found = likeness(torch.from_numpy(own), torch.from_numpy(texts))
    for number, text in enumerate(texts):
        nearest = max(float(text @ row) for row in own)
        closest = [
            max(float(row @ other) for j, other in enumerate(own) if j != i) for i, row in enumerate(own)
        ]
        assert float(found[number]) == pytest.approx(
            ((sum(one <= nearest for one in closest) + 1) / 41) ** 0.5
        )


def test_texts_like_the_rows_are_told_from_others():
    draw = torch.Generator().manual_seed(0)
    own, same, other = (torch.randn(200, 20, generator=draw) for _ in range(3))
    own, same, other = own + 2, same + 2, other - 2
    own, same, other = (torch.nn.functional.normalize(x, dim=1) for x in (own, same, other))
    assert float(likeness(own, same).mean()) > 0.5
    assert float(likeness(own, other).max()) < 0.15
