"""Rows as tokens: every label is the token at its place, and a model is asked for what it has learned."""

import random

import pytest
import small_tokenizers
import transformers

from edge_runtime.errors import InputError
from edge_runtime.trainer.examples import IGNORED
from edge_runtime.trainer.tokens import Tokenization

ROWS = [
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": "the ", "completion": "on"},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"prompt": "say it:\n", "completion": "yes"},
    {"prompt": "say it:\n\n", "completion": "the light  is on "},
    {"prompt": "", "completion": "anything é 😀"},
    {"prompt": "é😀", "completion": "😀é"},
    {"text": "the light", "label": "is on"},
]


@pytest.fixture(scope="module", params=small_tokenizers.ALL)
def tokenizer(request):
    return small_tokenizers.ALL[request.param]()


def tokenization(tokenizer, max_tokens=512, **how):
    return Tokenization(tokenizer, len(tokenizer), max_tokens, **how)


def pair(row):
    return (row["prompt"], row["completion"]) if "prompt" in row else (row["text"], f" {row['label']}")


def random_rows(count):
    """Prompts and completions that do not meet in the middle of a word."""
    draw, characters = random.Random(0), "the light on 2+é😀:\n\t  "
    for _ in range(count):
        prompt, completion = ("".join(draw.choices(characters, k=draw.randint(1, 12))) for _ in range(2))
        if prompt.strip() and completion.strip() and not (prompt[-1:].isalpha() and completion[0].isalpha()):
            yield {"prompt": prompt, "completion": completion}


def faults(tokenizer, row, example):
    """What is wrong with an example of a prompt and its completion."""
    prompt, completion = pair(row)
    whole = [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    while whole[-2] == tokenizer.eos_token_id:
        whole.pop()
    first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    learned = tokenizer.decode(example.ids[first:-1]).strip()
    if example.ids != whole:
        yield "other tokens than those of the whole text"
    if example.labels != [IGNORED] * first + example.ids[first:]:
        yield "labels are not the tokens at their place, to the end"
    if tokenizer.unk_token_id not in example.ids and not learned.endswith(
        tokenizer.decode(tokenizer(completion.strip(), add_special_tokens=False).input_ids).strip()
    ):
        yield "less is learned than the completion"
    asked = tokenization(tokenizer).asked(row)
    if asked.ids != example.ids[: len(asked.ids)]:
        yield "asked otherwise than learned"
    # the first token is never learned: nothing stands before it
    if max(len(asked.ids), 1) != max(first, 1):
        yield "what is learned does not begin where the question ends"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_row_is_tokenized_as_a_whole_and_asked_as_it_is_learned(tokenizer, row):
    assert [*faults(tokenizer, row, tokenization(tokenizer).example(row))] == []


def test_so_are_random_rows(tokenizer):
    how = tokenization(tokenizer)
    found = {
        (fault, str(row)) for row in random_rows(300) for fault in faults(tokenizer, row, how.example(row))
    }
    assert not {*list(found)[:3]}


def test_the_check_sees_tokens_of_two_texts_side_by_side():
    tokenizer = small_tokenizers.sentencepiece(add_eos_token=True)
    row = {"prompt": "2+2=", "completion": "4"}
    prompt, completion = (tokenizer(text).input_ids for text in pair(row))
    right = tokenization(tokenizer).example(row)
    apart = right._replace(ids=prompt + completion, labels=[IGNORED] * len(prompt) + completion)
    late = right._replace(labels=[IGNORED, *right.labels[:-1]])
    assert {*faults(tokenizer, row, apart)} >= {"other tokens than those of the whole text"}
    assert "labels are not the tokens at their place, to the end" in {*faults(tokenizer, row, late)}
    assert not {*faults(tokenizer, row, right)}


@pytest.mark.parametrize("row", [ROWS[1], ROWS[2]], ids=str)
def test_spaces_at_a_prompts_end_belong_to_the_answer(tokenizer, row):
    asked = tokenization(tokenizer).asked(row)
    assert asked.spaces == " "
    assert asked.ids == tokenization(tokenizer).asked({"prompt": row["prompt"].rstrip()}).ids


@pytest.mark.parametrize("text", ["the light is on", "the light is on</s>", "the light is on</s></s>"])
def test_a_text_ends_once(text):
    tokenizer = small_tokenizers.sentencepiece(add_eos_token=True)
    plain = tokenization(tokenizer).example({"text": text})
    assert tokenizer.decode(plain.ids) == "<s> the light is on</s>" and plain.labels == plain.ids
    completed = tokenization(tokenizer).example({"prompt": "the ", "completion": text.removeprefix("the ")})
    assert tokenizer.decode(completed.ids) == "<s> the light is on</s>"
    headed = tokenization(tokenizer, labels={"yes": 0}).example({"text": "the light is on", "label": "yes"})
    assert tokenizer.decode(headed.ids) == "<s> the light is on" and headed.answer == 0


def test_a_text_that_is_cut_does_not_end_there(tokenizer):
    text = "turn off the light please"
    whole = tokenization(tokenizer).example({"text": text})
    length = len(whole.ids)
    assert whole.labels[-1] == tokenizer.eos_token_id
    assert tokenization(tokenizer, length).example({"text": text}) == whole
    cut = tokenization(tokenizer, length - 1).example({"text": text})
    assert cut.labels == cut.ids == whole.ids[:-1]


@pytest.mark.parametrize("row", [ROWS[0], {"text": "a"}, ROWS[-1]], ids=str)
def test_a_tokenizer_without_an_end_cannot_teach_where_a_text_ends(row):
    how = tokenization(small_tokenizers.byte_level(eos=None))
    with pytest.raises(InputError, match=r"no end-of-text token \(eos_token\).*use rows of messages"):
        how.example(row)
    assert how.asked({"text": "a"}).ids  # which needs no end


def test_a_row_that_teaches_no_token_is_refused_unless_a_head_learns_it():
    tokenizer = small_tokenizers.byte_level()
    with pytest.raises(InputError, match="a row of text has no token to learn among its last 1"):
        tokenization(tokenizer).example({"text": "<eos>"})
    assert tokenization(tokenizer, labels={"a": 0}).example({"text": "on", "label": "b"}).counted == 0


def test_a_token_that_the_model_lacks_is_refused():
    tokenizer = small_tokenizers.byte_level()
    model = len(tokenizer)
    how = Tokenization(tokenizer, model, 64)
    tokenizer.add_tokens(["<new>"])
    assert how.example({"text": "the light"}).ids
    with pytest.raises(
        InputError, match=rf"makes token {model} of a row, but its embedding has {model} rows"
    ):
        how.example({"text": "the <new> light"})
    with pytest.raises(InputError, match=r"makes token"):
        how.asked({"text": "the <new> light"})


def test_a_tokenizer_that_does_not_place_its_tokens_is_refused():
    tokenizer = transformers.ByT5Tokenizer()
    with pytest.raises(InputError, match=r"tokenizer \(ByT5Tokenizer\) does not tell which characters"):
        tokenization(tokenizer).example(ROWS[0])


TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LONG = "on " * 200_000


@pytest.mark.parametrize(
    "row",
    [
        {"text": LONG},
        {"prompt": LONG, "completion": "yes"},
        {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "yes"}]},
    ],
    ids=["text", "pair", "messages"],
)
def test_of_a_very_long_text_no_more_is_tokenized_than_may_be_kept(row):
    tokenizer, seen = small_tokenizers.sentencepiece(), []

    class Watched:
        is_fast, eos_token_id, special_tokens_map = True, tokenizer.eos_token_id, {}
        added_tokens_decoder, chat_template = tokenizer.added_tokens_decoder, TEMPLATE

        def get_chat_template(self):
            return TEMPLATE

        def __call__(self, text, **how):
            seen.append(len(text))
            return tokenizer(text, **how)

    example = Tokenization(Watched(), len(tokenizer), 32).example(row)
    assert len(example.ids) == 32 and max(seen) <= 32 * 64
    if "text" not in row:
        assert tokenizer.decode([label for label in example.labels if label != IGNORED]) == "yes</s>"
