"""An answer's text comes in whole characters, ends where it should, and is the text that was written."""

import pytest

from edge_runtime.serving.text import HALF, Language, TextStream
from edge_runtime.trainer.examples import IGNORED
from edge_runtime.trainer.tokens import Tokenization

TEXTS = [
    "Grüße aus Łódź",
    "你好，世界。",
    "👩‍👩‍👧‍👦 and 🇨🇭!",
    "  two  spaces\n\nand lines",
    "naïve café’s «é»",
]


@pytest.fixture(scope="module")
def language(demo_facts):
    return Language(demo_facts)


def streamed(language, text, stop=()):
    ids = language.tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(language, language.prompt("Say:").ids, stop)
    pieces = [stream.push(token) for token in ids if not stream.stopped]
    return [*pieces, "" if stream.stopped else stream.rest()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_in_whole_characters(language, text):
    pieces = streamed(language, text)
    assert "".join(pieces) == text and len(pieces) > 3
    assert not any(HALF in piece for piece in pieces)


def test_tokens_alone_are_half_characters(language):
    """The twin of the test above: without the stream, characters are torn."""
    ids = language.tokenizer("你好，世界。👩‍👩‍👧‍👦").input_ids
    assert HALF in "".join(language.tokenizer.decode([token]) for token in ids)


def test_half_a_character_at_the_end_is_left_out(language):
    ids = language.tokenizer("a👩").input_ids
    assert len(ids) > 2
    stream = TextStream(language, language.prompt("Say:").ids, ())
    assert "".join(stream.push(token) for token in ids[:-1]) + stream.rest() == "a"


def test_bytes_that_are_no_character_do_not_hold_the_text_back(language):
    (half,) = language.tokenizer.convert_tokens_to_ids(["ð"])  # the first byte of four
    stream = TextStream(language, language.prompt("Say:").ids, ())
    letters = language.tokenizer("abc", add_special_tokens=False).input_ids
    assert "".join(stream.push(token) for token in [half] * 6 + letters).endswith("abc")


@pytest.mark.parametrize(
    ("stop", "truth"),
    [
        (("END",), "one two three"),
        (("wo",), "one t"),
        (("three", "two t"), "one "),
        (("e two",), "on"),
        (("threes", "twos"), "one two three"),
    ],
)
def test_a_stop_text_ends_the_answer_wherever_its_tokens_end(language, stop, truth):
    assert "".join(streamed(language, "one two three", stop)) == truth


def test_text_that_may_begin_a_stop_text_is_held_back(language):
    stream = TextStream(language, language.prompt("Say:").ids, ("two four",))
    pieces = [stream.push(token) for token in language.tokenizer(" one two three").input_ids]
    assert pieces == [" one", " ", "two three"]


def test_spaces_that_the_prompt_ends_with_are_not_written_again(language):
    asked = language.prompt("Say: ")
    assert asked == (language.prompt("Say:").ids, " ")
    for text, written in ((" one", "one"), ("  one", " one"), ("one two", "one two")):
        stream = TextStream(language, asked.ids, (), asked.spaces)
        ids = language.tokenizer(text, add_special_tokens=False).input_ids
        assert "".join(stream.push(token) for token in ids) == written


def test_prompts_and_texts_are_the_tokens_that_training_has(language, demo_facts):
    how = Tokenization(language.tokenizer, demo_facts.vocabulary, 64, labels={"a": 0})
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for row, asked in (
        ({"prompt": "Say 2: ", "completion": "2"}, language.prompt("Say 2: ")),
        ({"messages": messages}, language.chat(messages[:1])),
    ):
        example = how.example(row)
        first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
        assert asked.ids == example.ids[:first]
    assert language.labelled("it rained ") == how.example({"text": "it rained ", "label": "a"}).ids
