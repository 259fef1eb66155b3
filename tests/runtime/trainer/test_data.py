"""Rows in files: every form, every mistake by its line, and rows held out, in memory that does not grow."""

import json
import random
import tracemalloc
from itertools import islice

import pytest

from edge_runtime.errors import InputError
from edge_runtime.trainer.data import (
    MOST_BYTES,
    count_rows,
    hold_out,
    labels_of,
    permuted,
    read_rows,
    stream,
    write_rows,
)

FORMS = [
    {"prompt": "say 3: ", "completion": "3 3"},
    {"prompt": "", "completion": "anything"},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
    {"text": "once upon a time"},
    {"text": "it rained all day", "label": "bad"},
]


@pytest.fixture
def read(tmp_path):
    def rows(content):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_rows(path)

    return rows


# --- reading


def test_every_form_is_read_as_it_was_written(tmp_path):
    assert read_rows(write_rows(tmp_path / "rows.jsonl", FORMS)) == FORMS


def test_blank_lines_windows_line_ends_and_further_keys_do_no_harm(read):
    assert read('\n{"text": "a", "source": "x"}\r\n  \n{"text": "b"}') == [
        {"text": "a", "source": "x"},
        {"text": "b"},
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c"])
def test_a_separator_of_lines_inside_a_text_is_part_of_it(tmp_path, separator):
    row = {"text": f"one{separator}two"}
    assert read_rows(write_rows(tmp_path / "rows.jsonl", [row])) == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ('{"text": "\\ud83d"}', "holds half of a character"),
        ("not json", "not a JSON object on one line (Expecting value, character 1)"),
        ('{"text": "a"', "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("[1, 2]", "list seen, a JSON object is needed"),
        ("null", "NoneType seen, a JSON object is needed"),
        ("{}", "has nothing; needed: prompt and completion, or messages, or text"),
        ('{"prompt": "a"}', "has prompt; needed"),
        ('{"completion": "a"}', "has completion; needed"),
        ('{"label": "a"}', "has label; needed"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "has completion, prompt, text; needed"),
        ('{"question": "a", "answer": "b"}', "has answer, question; needed"),
        ('{"prompt": "a", "completion": ""}', '`completion` has to be text that is not empty, seen ""'),
        ('{"prompt": "a", "completion": 3}', "`completion` has to be text that is not empty, seen a number"),
        ('{"prompt": null, "completion": "b"}', "`prompt` has to be text that is not empty, seen null"),
        ('{"text": "  "}', "`text` has to be text that is not empty"),
        ('{"text": "a", "label": 1}', "`label` has to be text that is not empty, seen a number"),
        ('{"messages": "hello"}', "`messages` has to be a list of objects with a role and a content"),
        (
            '{"messages": [{"role": "user"}]}',
            "`messages` has to be a list of objects with a role and a content",
        ),
        ('{"messages": []}', "no message has the role assistant"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the first message is the assistant's"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(read, line, message):
    with pytest.raises(InputError) as refused:
        read('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    assert "rows.jsonl, line 3: " in str(refused.value)
    assert message in str(refused.value)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": TURNS, "tools": [{"type": "function"}]},
            "has tools, which is not written into the prompt",
        ),
        ({"prompt": "a", "completion": "b", "system": "be brief"}, "has system, which is not written"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "a message has a weight other than 1"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": False}]}, "a message has a weight other than 1"),
    ],
)
def test_a_key_that_changes_what_other_trainers_learn_is_refused(read, row, message):
    with pytest.raises(InputError, match=message):
        read(json.dumps(row))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "tools": [], "documents": None},
        {"text": "a", "label": "b", "system": "Linux"},
        {"messages": [TURNS[0], {**TURNS[1], "weight": 1, "train": True}]},
    ],
)
def test_such_a_key_does_no_harm_where_it_changes_nothing(read, row):
    assert read(json.dumps(row)) == [row]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(read, content):
    with pytest.raises(InputError, match=r"rows.jsonl has no rows: write one JSON object a line"):
        read(content)


def test_a_missing_file_and_one_that_is_not_utf_8_are_refused(read, tmp_path):
    with pytest.raises(InputError, match=r"cannot read the data file .*nowhere.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 10\)"):
        read(b'{"text": "' + "é".encode("latin-1") + b'"}')


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_file_that_windows_has_marked_as_utf_8_is_read(read, ends):
    assert read(f'\ufeff{{"text": "Größe"}}{ends}\ufeff{{"text": "b"}}') == [{"text": "Größe"}, {"text": "b"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_refused_by_its_name(read, encoding):
    with pytest.raises(InputError, match=r"rows.jsonl is UTF-16 text .*save it as UTF-8"):
        read('{"text": "a"}\n'.encode(encoding))


def test_numbers_that_only_json_for_python_knows_do_no_harm_in_further_keys(read):
    assert read('{"text": "a", "score": NaN}')[0]["text"] == "a"


def test_a_line_that_is_too_long_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(4 * MOST_BYTES)
    tracemalloc.start()
    with pytest.raises(InputError, match="line 2: longer than 16 MiB, the most that a row may have"):
        read_rows(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * MOST_BYTES
    tracemalloc.stop()


def test_chosen_rows_are_read_and_checked_and_others_are_counted_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"text": "a"}\nno row\n\n{"text": "c"}\n')
    assert count_rows(path) == 3
    assert list(stream(path, {0, 2})) == [{"text": "a"}, {"text": "c"}]
    with pytest.raises(InputError, match="line 3: not a JSON object"):
        list(stream(path, {1}))


def held_out_of(path):
    train, held_out = path.with_name("train.jsonl"), path.with_name("own.jsonl")
    return (read_rows(train), read_rows(held_out)) if hold_out(path, train, held_out, seed=0) else None


def test_every_tenth_row_is_held_out_and_at_most_200(tmp_path):
    rows = [{"text": str(n)} for n in range(95)]
    train, held = held_out_of(write_rows(tmp_path / "rows.jsonl", rows))
    assert (len(train), len(held)) == (86, 9)
    assert sorted(train + held, key=rows.index) == rows and held != rows[:9]
    assert train == sorted(train, key=rows.index)
    assert held == random.Random(0).sample(rows, len(rows))[:9]
    many = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 5000)
    assert len(held_out_of(many)[1]) == 200
    assert held_out_of(write_rows(tmp_path / "rows.jsonl", rows[:9])) is None


def test_held_out_rows_of_a_file_from_windows_are_whole(tmp_path):
    rows = [{"text": f"Größe {n}"} for n in range(20)]
    lines = "\r\n".join(json.dumps(row) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{lines}".encode())
    train, held = held_out_of(tmp_path / "rows.jsonl")
    assert sorted(train + held, key=rows.index) == rows
    assert b"\r" not in (tmp_path / "train.jsonl").read_bytes()


# --- memory


def traced_peak(function, *arguments):
    """Bytes that Python's objects take at most while a function runs."""
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def check(path):
    for _ in stream(path):
        pass


@pytest.mark.parametrize("deed", [check, count_rows, "hold out"])
def test_memory_does_not_grow_with_the_rows(tmp_path, deed):
    def of(count):
        rows = ({"prompt": f"number {n}", "completion": "x" * 50} for n in range(count))
        path = write_rows(tmp_path / "rows.jsonl", rows)
        if callable(deed):
            return traced_peak(deed, path)
        return traced_peak(hold_out, path, tmp_path / "train.jsonl", tmp_path / "own.jsonl", 0)

    assert of(20_000) < of(2_000) + 50_000  # 2 MB of rows
    path = write_rows(tmp_path / "rows.jsonl", ({"text": "x" * 50} for _ in range(20_000)))
    assert traced_peak(read_rows, path) > 4_000_000  # so the check can see rows in memory


# --- draws


@pytest.mark.parametrize("count", [1, 2, 20, 22, 500])
def test_numbers_drawn_one_by_one_are_those_of_a_whole_sample(count):
    for seed in range(5):
        whole, draw = random.Random(seed), random.Random(seed)
        for _ in range(2):
            assert list(permuted(count, draw)) == whole.sample(range(count), count)


def test_a_few_numbers_of_many_take_no_memory():
    assert traced_peak(lambda: list(islice(permuted(10_000_000, random.Random(0)), 100))) < 100_000


def test_labels_are_those_of_the_rows_that_have_some():
    assert labels_of(iter([{"text": "a", "label": "x"}, {"text": "b"}, {"text": "c", "label": "x"}])) == {"x"}


def test_what_was_written_is_one_json_object_a_line(tmp_path):
    lines = write_rows(tmp_path / "rows.jsonl", FORMS).read_text(encoding="utf-8").strip().split("\n")
    assert [json.loads(line) for line in lines] == FORMS
