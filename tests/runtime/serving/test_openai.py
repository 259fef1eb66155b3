"""Requests that are refused before a model is asked."""

import contextlib

import pytest

from edge_runtime.serving import openai
from edge_runtime.serving.openai import CompletionRequest, RequestError


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
