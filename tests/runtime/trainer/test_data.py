"""Rows from a file to labelled tokens: every form, every mistake by its line, and what truncation keeps."""

import copy
import json
from itertools import islice

import pytest

from edge_runtime.errors import InputError
from edge_runtime.trainer.data import (
    IGNORED,
    Example,
    batches,
    epochs,
    read_rows,
    split,
    tokenize,
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
        ("not json", "not a JSON object"),
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


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(read, content):
    with pytest.raises(InputError, match=r"rows.jsonl has no rows: write one JSON object a line"):
        read(content)


def test_a_missing_file_and_one_that_is_not_utf_8_are_refused(read, tmp_path):
    with pytest.raises(InputError, match=r"cannot read the data file .*nowhere.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 10\)"):
        read(b'{"text": "' + "é".encode("latin-1") + b'"}')


def test_split_holds_out_every_tenth_row_and_at_most_200():
    rows = [{"text": str(n)} for n in range(95)]
    train, held = split(rows, seed=0)
    assert (len(train), len(held)) == (86, 9)
    assert sorted(train + held, key=rows.index) == rows
    assert (train, held) == split(rows, seed=0) != split(rows, seed=1)
    assert held != rows[:9]
    assert len(split([{"text": "a"}] * 5000, seed=0)[1]) == 200
    assert split(rows[:9], seed=0)[1] == []


# --- tokens and labels


def said(example, tokenizer):
    """The whole text, and what of it is learned."""
    learned = [label for label in example.labels if label != IGNORED]
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))
    return tokenizer.decode(example.ids), tokenizer.decode(learned)


def test_the_completion_and_the_end_are_learned(demo_tokenizer):
    (example,) = tokenize([{"prompt": "say 3: ", "completion": "3 3"}], demo_tokenizer, 64)
    end = demo_tokenizer.eos_token
    assert said(example, demo_tokenizer) == (f"say 3: 3 3{end}", f"3 3{end}")


def test_the_label_after_a_text_is_learned(demo_tokenizer):
    (example,) = tokenize([{"text": "it rained", "label": "bad"}], demo_tokenizer, 64)
    end = demo_tokenizer.eos_token
    assert said(example, demo_tokenizer) == (f"it rained bad{end}", f" bad{end}")


def test_of_plain_text_everything_is_learned(demo_tokenizer):
    (example,) = tokenize([{"text": "it rained"}], demo_tokenizer, 64)
    whole = f"it rained{demo_tokenizer.eos_token}"
    assert said(example, demo_tokenizer) == (whole, whole)


def test_of_a_chat_only_the_assistants_turns_are_learned(demo_tokenizer):
    messages = [
        {"role": "system", "content": "You are short."},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "what is 2 + 2?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "thanks"},
    ]
    (example,) = tokenize([{"messages": messages}], demo_tokenizer, 512)
    whole, learned = said(example, demo_tokenizer)
    assert whole == demo_tokenizer.apply_chat_template(messages[:5], tokenize=False)
    assert learned == "hi<|im_end|>\nfour<|im_end|>\n"
    assert (
        said(example._replace(labels=example.ids), demo_tokenizer)[1] == whole
    )  # so the mask is what is tested


def test_messages_that_the_chat_template_refuses_are_named(demo_tokenizer):
    strict = copy.copy(demo_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="refuses messages of the roles user: roles must alternate"):
        tokenize([FORMS[2]], strict, 64)


def test_a_model_without_a_chat_template_cannot_learn_from_messages(demo_tokenizer):
    plain = type("Plain", (), {"chat_template": None})()
    with pytest.raises(InputError, match=r"no chat template.*use prompt and completion rows"):
        tokenize([FORMS[2]], plain, 64)


@pytest.mark.parametrize("row", [FORMS[0], FORMS[4]])
def test_a_row_that_is_too_long_loses_the_beginning_of_its_prompt(demo_tokenizer, row):
    key = "prompt" if "prompt" in row else "text"
    (whole,) = tokenize([row], demo_tokenizer, 64)
    (long,) = tokenize(
        [{**row, key: "many more words " * 100 + row[key]}], demo_tokenizer, len(whole.ids) + 5
    )
    assert len(long.ids) == len(whole.ids) + 5
    assert said(long, demo_tokenizer)[1] == said(whole, demo_tokenizer)[1]
    assert long.ids[-len(whole.ids) + 1 :] == whole.ids[1:]


def test_a_text_that_is_too_long_loses_its_end_and_a_chat_its_beginning(demo_tokenizer):
    (text,) = tokenize([{"text": "one two three four five"}], demo_tokenizer, 3)
    assert said(text, demo_tokenizer)[0] == f"one two{demo_tokenizer.eos_token}"
    chat = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "fine"}]
    (cut,) = tokenize([{"messages": chat}], demo_tokenizer, 10)
    assert len(cut.ids) == 10
    assert said(cut, demo_tokenizer)[1] == "fine<|im_end|>\n"


def test_every_example_has_something_to_learn_after_its_first_token(demo_tokenizer):
    for most in (8, 16, 512):
        for example in tokenize(FORMS, demo_tokenizer, most):
            assert any(label != IGNORED for label in example.labels[1:])
            assert len(example.ids) == len(example.labels) <= most


# --- order


def examples(lengths):
    return [Example([n] * length, [n] * length) for n, length in enumerate(lengths)]


def test_batches_hold_every_example_once_and_alike_lengths_together():
    given = examples([5, 30, 4, 29, 6, 28, 3])
    grouped = list(batches(given, 3))
    assert [sorted(len(one.ids) for one in group) for group in grouped] == [[3, 4, 5], [6, 28, 29], [30]]
    assert sorted(one for group in grouped for one in group) == sorted(given)


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    given = examples([1] * 20)
    drawn = list(islice(epochs(given, "0/1"), 60))
    passes = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(one) == sorted(given) for one in passes)
    assert passes[0] != passes[1] != passes[2] != given
    assert drawn == list(islice(epochs(given, "0/1"), 60))
    assert drawn != list(islice(epochs(given, "0/2"), 60))


def test_what_was_written_is_one_json_object_a_line(tmp_path):
    lines = write_rows(tmp_path / "rows.jsonl", FORMS).read_text(encoding="utf-8").strip().split("\n")
    assert [json.loads(line) for line in lines] == FORMS
