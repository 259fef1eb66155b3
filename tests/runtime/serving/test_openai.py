"""Requests that are refused before a model is asked."""

import contextlib
import json

import pytest

from edge_runtime.serving import openai
from edge_runtime.serving.openai import ChatRequest, CompletionRequest, RequestError
from edge_runtime.trainer.tokens import Asked


def nested(depth):
    return b'{"prompt": "x", "metadata": ' + b"[" * depth + b"]" * depth + b"}"


def test_json_that_is_nested_deeply_is_refused():
    with pytest.raises(RequestError, match=r"the body is not JSON: .*recursion") as refused:
        openai.read(nested(200_000), CompletionRequest)
    assert refused.value.status == 400


@pytest.mark.parametrize("depth", [300, 600, 900])
def test_json_near_pythons_limit_is_read_or_refused(depth):
    with contextlib.suppress(RequestError):  # each Python has another limit
        assert openai.read(nested(depth), CompletionRequest).prompt == "x"


class Recording:
    """A tokenizer that gives a token a text, and keeps the texts."""

    def __init__(self):
        self.texts = []

    def prompt(self, text):
        self.texts.append(text)
        return Asked([1], "")

    def chat(self, turns):
        return self.prompt("".join(turn["content"] for turn in turns))


def question(kind, language, **fields):
    """The question of a request in a context of 8 tokens, which have less than 64 characters each."""
    return openai.question(openai.read(json.dumps(fields).encode(), kind), language, 8, 96)


TURN = {"role": "user", "content": "x" * 256}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": "x" * 513}),
        (CompletionRequest, {"prompt": ["x" * 513]}),
        (ChatRequest, {"messages": [TURN, TURN, TURN | {"content": "x"}]}),
        (ChatRequest, {"messages": [TURN | {"content": [{"type": "text", "text": "x" * 513}]}]}),
        (ChatRequest, {"messages": [TURN | {"content": ""}] * 9}),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(kind, fields):
    language = Recording()
    with pytest.raises(RequestError, match="which cannot fit the context of 8 tokens") as refused:
        question(kind, language, **fields)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert language.texts == []


def test_a_prompt_that_may_fit_is_tokenized():
    language = Recording()
    question(CompletionRequest, language, prompt="x" * 512, max_tokens=1)
    question(ChatRequest, language, messages=[TURN, TURN])
    assert language.texts == ["x" * 512] * 2
