"""Stage "read": of many rows, those that the round's steps draw become tokens."""

import tracemalloc
from itertools import islice

import msgspec
import pytest
import small_tokenizers
from jobs import job_of

from benchmarks import noise
from edge_runtime import settings
from edge_runtime.errors import InputError
from edge_runtime.trainer import data
from edge_runtime.trainer.examples import epochs, first_rows, order_of
from edge_runtime.trainer.run import read
from edge_runtime.trainer.states import sample
from edge_runtime.trainer.tokens import Tokenization

TOKENIZER = small_tokenizers.byte_level()
FACTS = msgspec.structs.replace(noise.FACTS, vocabulary=len(TOKENIZER))
PLAN = msgspec.structs.replace(noise.PLAN, tokens=32)
TRAINING = settings.Training(steps=3, rows_a_step=4)


@pytest.fixture
def job_for(tmp_path):
    """job_for(rows, held_out, ...): the job of a file of rows."""

    def of(rows, held_out=(), **changes):
        evaluation = {"own": str(data.write_rows(tmp_path / "own.jsonl", held_out))} if held_out else {}
        values = {"train": True, "round": 2, "rounds": 3, "facts": FACTS, "plan": PLAN, "depths": (1,)}
        values |= {"data": str(data.write_rows(tmp_path / "rows.jsonl", rows)), "evaluation": evaluation}
        return job_of(**{**values, "training": TRAINING, "seed": 5, **changes})

    return of


@pytest.fixture
def reading(job_for, tmp_path):
    """reading(rows, held_out, ...): what is read for the job of a file of rows."""
    return lambda *rows, **changes: read(job_for(*rows, **changes), tmp_path, TOKENIZER)


def numbered(count):
    return [{"prompt": f"light {number}:", "completion": " on"} for number in range(count)]


@pytest.mark.parametrize("count", [5, 12, 200])
def test_the_steps_get_the_rows_that_they_would_get_of_all_rows(reading, count):
    rows = numbered(count)
    material = reading(rows, rows[:3])
    whole = Tokenization(TOKENIZER, FACTS.vocabulary, 32).examples(rows)
    order = order_of(5, 2)
    assert list(islice(epochs(material.examples, order), 12)) == list(islice(epochs(whole, order), 12))
    assert (material.examples.count, len(material.examples)) == (count, min(count, 12))
    assert [*material.held_out["own"]] == whole[:3] and material.told == []


def test_a_row_that_no_step_draws_is_not_read(reading):
    """The agent has read every row before; a round reads a file again as far as its steps need."""
    needed = set(first_rows(200, 12, order_of(5, 2)))
    spare = next(number for number in range(200) if number not in needed)
    rows = numbered(200)
    reading([*rows[:spare], {"broken": True}, *rows[spare + 1 :]])
    broken = min(needed)
    with pytest.raises(InputError, match=rf"line {broken + 1}: has broken; needed: prompt"):
        reading([*rows[:broken], {"broken": True}, *rows[broken + 1 :]])


def test_the_labels_of_all_rows_are_known_where_there_is_a_head(reading):
    rows = [{"text": f"light {number}", "label": f"name {number % 50}"} for number in range(100)]
    material = reading(rows, head=settings.Head())
    assert material.met == {row["label"] for row in rows} and material.labels == sorted(material.met)
    without = reading(rows)
    assert without.met == set() and without.labels == []


def test_rows_that_public_texts_are_compared_with_are_read_too(reading, tmp_path):
    texts = data.write_rows(tmp_path / "public.jsonl", [{"text": "turn off"}])
    spec = settings.Codistill(tokens=4)
    material = reading(numbered(1000), public=settings.Public("", 1), codistill=spec, texts=str(texts))
    compared = sample(material.examples)
    assert len(compared) == 500
    assert TOKENIZER.decode(compared[-1].ids).startswith("light 998:")


def test_a_row_that_the_model_cannot_learn_is_named(reading):
    rows = [
        *numbered(3),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    with pytest.raises(InputError, match=r"rows.jsonl, row 4: the model has no chat template"):
        reading(rows)


SILENT = {"text": "<eos>"}  # its only token is the first, which nothing predicts


@pytest.mark.parametrize("count", [12, 200])
def test_rows_that_teach_nothing_are_passed_over_counted_and_named(reading, count):
    """The steps still get as many rows as they take, and those in the order of all rows."""
    rows = numbered(count)
    first, second, *_ = first_rows(count, 12, order_of(5, 2))
    rows[first] = rows[second] = SILENT
    material = reading(rows, [*numbered(4), SILENT])
    assert (material.empty, len(material.examples)) == (2, 10)
    assert [sentence.rpartition("/")[2] for sentence in material.told] == [
        f"rows.jsonl: 2 of 12 rows are passed over, as they have no token to learn: row {first + 1}, {second + 1}",
        "own.jsonl: 1 of 5 rows are passed over, as they have no token to learn: row 5",
    ]
    taken = list(islice(epochs(material.examples, order_of(5, 2)), 12))
    assert sorted(taken[:10]) == sorted(material.examples) and taken[10] in taken[:10]
    assert [*material.held_out["own"]] == Tokenization(TOKENIZER, FACTS.vocabulary, 32).examples(numbered(4))


def test_of_many_rows_that_teach_nothing_the_first_are_named(reading):
    material = reading([*numbered(1), *[SILENT] * 11])
    assert material.told[0].endswith(
        "11 of 12 rows are passed over, as they have no token to learn: "
        "row 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ..."
    )


@pytest.mark.parametrize("held_out", [[], [SILENT]])
def test_a_round_is_refused_where_no_row_is_left(reading, held_out):
    rows, name = (numbered(3), "own") if held_out else ([SILENT] * 3, "rows")
    with pytest.raises(
        InputError, match=rf"{name}.jsonl: none of the \d rows that are needed has a token to learn"
    ):
        reading(rows, held_out)


def test_a_file_of_rows_that_has_become_shorter_is_refused(reading, monkeypatch):
    monkeypatch.setattr(data, "count_rows", lambda _: 4)
    with pytest.raises(InputError, match=r"rows.jsonl has become shorter while it was read"):
        reading(numbered(3))


@pytest.mark.parametrize("changes", [{}, {"head": settings.Head()}, {"train": False}], ids=str)
def test_memory_does_not_grow_with_the_rows(job_for, tmp_path, changes):
    def peak(count):
        rows = [{"text": f"light {number} {'on ' * 40}", "label": "yes"} for number in range(count)]
        job = job_for(rows, rows[:20], **changes)
        tracemalloc.start()
        material = read(job, tmp_path, TOKENIZER)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del material
        return taken

    peak(20)  # what a first call loads
    assert peak(5_000) < peak(200) + 100_000  # 700 kB of rows


def test_a_trainer_takes_as_much_memory_for_many_rows_as_for_few(trained, record_property):
    """Of the whole process, as Linux counts it; all rows as tokens would take 100 MiB."""
    peaks = {}
    for count in (200, 40_000):
        rows = [
            {"prompt": f"{number} " + "the garden light " * 8, "completion": "on"} for number in range(count)
        ]
        rows[first_rows(count, 12, order_of(5, 1))[0]] = {"text": "<|im_end|>"}  # the demo's end of text
        _, result = trained(str(count), rows, rows[:8], training=TRAINING)
        assert (result.empty, result.samples) == (1, 11)
        peaks[count] = result.phases["load"].peak_bytes / (1 << 20)
        record_property(f"MiB of the load phase with {count} rows", round(peaks[count]))
    assert peaks[40_000] < peaks[200] + 8
