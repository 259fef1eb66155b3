"""A server process: OpenAI's interface, hostile clients, and new versions under load."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fleet import Command, eventually, resident_bytes
from serving import Client, chatting, events_of, server, version

from edge_runtime import settings
from edge_runtime.adapters import learned
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning import processes
from edge_runtime.planning.predict import Serving, Workload
from edge_runtime.planning.serving import serving_bytes
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Backend, Weights

GREEDY = {"prompt": "Once upon", "max_tokens": 24, "temperature": 0}
LONG = GREEDY | {"max_tokens": 6000}  # minutes; a random model that is greedy never ends by itself
SAY = [{"role": "user", "content": "say 3"}]


class Running(NamedTuple):
    """A server, and where its versions appear."""

    command: Command
    client: Client
    facts: Facts
    adapter: Path


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatting(tiny_model, tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def running(model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(cache))
        facts = processes.prepared(str(model), Path())
    adapter = tmp_path_factory.mktemp("serve") / "adapter"
    learned.write(version(facts, 1), adapter)
    with server(model, cache, "--adapter", str(adapter), "--context", "8192") as (command, client):
        yield Running(command, client, facts, adapter)


@pytest.fixture
def client(running: Running) -> Client:
    return running.client


def test_a_streamed_answer_is_the_whole_one(client: Client) -> None:
    for fields in (GREEDY, GREEDY | {"temperature": 1, "seed": 7, "top_p": 0.9, "max_tokens": 100}):
        status, whole = client.ask("completions", **fields)
        events = client.events("completions", **fields, stream_options={"include_usage": True})
        assert status == 200 and whole["object"] == "text_completion"
        (choice,) = whole["choices"]
        texts = [event["choices"][0]["text"] for event in events[:-1]]
        assert "".join(texts) == choice["text"] and len(texts) > 3
        assert events[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert events[-1]["usage"] == whole["usage"]
        assert {event["system_fingerprint"] for event in events} == {whole["system_fingerprint"]}


def test_a_chat_is_answered_in_the_models_template(client: Client) -> None:
    asked: dict[str, Any] = {"messages": SAY, "max_tokens": 12, "temperature": 0}
    status, whole = client.ask("chat/completions", **asked)
    message = whole["choices"][0]["message"]
    assert status == 200 and message["role"] == "assistant" and whole["object"] == "chat.completion"
    # the same as the rendered text, but for its end token, which no text can hold
    assert whole["usage"]["prompt_tokens"] == len("user: say 3") + 1 + len("assistant:")
    first, *rest = client.events("chat/completions", **asked)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in rest)
    assert (text, rest[-1]["choices"][0]["delta"]) == (message["content"], {})
    parts = [{"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "3"}]}]
    assert client.ask("chat/completions", **asked | {"messages": parts})[1]["choices"] == whole["choices"]


def test_an_answer_ends_before_a_stop_text(client: Client) -> None:
    text = client.ask("completions", **GREEDY)[1]["choices"][0]["text"]
    stop = text[4:6]
    _, answer = client.ask("completions", **GREEDY, stop=[stop])
    assert answer["choices"][0] | {"finish_reason": "stop"} == answer["choices"][0]
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["usage"]["completion_tokens"] < GREEDY["max_tokens"]


def test_the_model_its_version_and_the_health_are_told(client: Client) -> None:
    (model,) = client.get("/v1/models")["data"]
    assert (model["id"], model["version"]) == ("tiny", 1)
    assert client.get("/health") == {"status": "ok", "version": 1}
    status, answer = client.ask(
        "completions", **GREEDY, model="tiny", n=1, user="me", logprobs=None, top_p=1.0
    )
    assert (status, answer["model"], answer["system_fingerprint"]) == (200, "tiny", "version-1")


REFUSED: dict[str, tuple[dict[str, Any], int, str | None, str | None]] = {
    "another model": (GREEDY | {"model": "gpt"}, 404, "model", "model_not_found"),
    "two answers": (GREEDY | {"n": 2}, 400, "n", "unsupported_value"),
    "the logprob of the chosen token": (GREEDY | {"logprobs": 0}, 400, "logprobs", "unsupported_value"),
    "logprobs": (GREEDY | {"logprobs": 3}, 400, "logprobs", "unsupported_value"),
    "a field nobody knows": (GREEDY | {"beam": 2}, 400, "beam", "unsupported_parameter"),
    "a wrong type": (GREEDY | {"max_tokens": "8"}, 400, "max_tokens", None),
    "out of range": (GREEDY | {"temperature": 3}, 400, "temperature", None),
    "no prompt": ({}, 400, "prompt", None),
    "an empty prompt": ({"prompt": ""}, 400, "prompt", None),
    "two prompts": ({"prompt": ["a", "b"]}, 400, "prompt", None),
    "a token that is none": ({"prompt": [5, 300]}, 400, "prompt", None),
    "a long prompt": ({"prompt": "x" * 9000}, 400, "prompt", "context_length_exceeded"),
    "a long answer": (GREEDY | {"max_tokens": 9000}, 400, "prompt", "context_length_exceeded"),
    "a stop text without text": (GREEDY | {"stop": [""]}, 400, "stop", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_kept_is_refused_by_name(client: Client, name: str) -> None:
    fields, status, param, code = REFUSED[name]
    for stream in (False, True):
        seen, answer = client.ask("completions", **fields, stream=stream)
        error = answer["error"]
        assert (seen, error["param"], error["code"]) == (status, param, code)
        assert error["type"] == "invalid_request_error" and len(error["message"]) > 10


def test_a_chat_that_cannot_be_read_is_refused(client: Client) -> None:
    for turns, param in (
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ("say", "messages"),
    ):
        status, answer = client.ask("chat/completions", messages=turns)
        assert (status, answer["error"]["param"]) == (400, param)


HOSTILE = {
    "no JSON": b"{",
    "no object": b"[1]",
    "no UTF-8": b'{"prompt": "\xff"}',
    "half a character": b'{"prompt": "\\ud83d"}',
    "deep": b"[" * 200_000,
    "as deep as Python goes": b'{"prompt": ' + b"[" * 600 + b"]" * 600 + b"}",
    "numbers without end": b'{"prompt": "x", "seed": 1e999, "max_tokens": 4}',
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused(client: Client, name: str) -> None:
    status, answer = client.raw("POST", "/v1/completions", HOSTILE[name])
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_other_places_and_names_are_refused(client: Client) -> None:
    for path, refused in (("/v1/embeddings", 404), ("/chat/completions", 404), ("/v1/completions", 405)):
        status, answer = client.raw("GET", path)
        assert status == refused and "POST /v1/chat/completions" in answer["error"]["message"]
    assert client.raw("POST", "/v1/completions", b" " * (1 << 20) + b"{}")[0] == 413
    # a page of the web that leads a browser here under a name of its own
    connection = client.connection()
    connection.request("GET", "/health", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 403


def test_clients_that_send_nothing_keep_nobody_out(client: Client) -> None:
    with ExitStack() as opened:
        for _ in range(400):
            opened.enter_context(socket.create_connection(("127.0.0.1", client.port)))
        assert client.ask("completions", **GREEDY)[0] == 200


def test_a_client_that_goes_away_leaves_its_place(client: Client) -> None:
    """Three long answers would keep both places for minutes."""
    for stream in (True, True, False):
        connection = client.begin("completions", **LONG, stream=stream)
        if stream:
            next(events_of(connection))
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    assert client.ask("completions", **GREEDY)[0] == 200
    assert client.ask("completions", **GREEDY)[0] == 200


def test_a_full_queue_refuses_and_goes_on(client: Client) -> None:
    connections = [client.begin("completions", **LONG) for _ in range(40)]
    # those that are refused answer at once, the others not for minutes
    refused: list[http.client.HTTPResponse] = []
    for connection in connections:
        assert connection.sock is not None
        connection.sock.settimeout(None)

    def read(connection: http.client.HTTPConnection) -> None:
        try:
            refused.append(connection.getresponse())
        except (OSError, http.client.HTTPException):
            return

    for connection in connections:
        threading.Thread(target=read, args=(connection,), daemon=True).start()
    assert eventually(lambda: len(refused) >= 6)
    assert {response.status for response in refused} == {429}
    assert refused[0].headers["Retry-After"] == "1"
    assert json.loads(refused[0].read())["error"]["code"] == "rate_limit_exceeded"
    for connection in connections:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
    assert eventually(lambda: client.ask("completions", **GREEDY)[0] == 200)


@pytest.mark.parametrize("swaps", [10, 100])
def test_versions_are_swapped_under_load_without_a_lost_request(running: Running, swaps: int) -> None:
    client, first = running.client, running.client.get("/health")["version"]
    answers: list[tuple[int, str, str]] = []
    done = threading.Event()

    def ask() -> None:
        status, answer = client.ask("completions", **GREEDY | {"max_tokens": 6})
        answers.append((status, answer["system_fingerprint"], answer["choices"][0]["text"]))

    def load() -> None:
        while not done.is_set():
            ask()

    threads = [threading.Thread(target=load) for _ in range(3)]
    long = client.begin("completions", **LONG | {"max_tokens": 400}, stream=True)
    events = events_of(long)
    begun = next(events)["system_fingerprint"]
    for thread in threads:
        thread.start()
    for number in range(first + 1, first + swaps + 1):
        learned.write(version(running.facts, number), running.adapter)
        running.command.until(lambda event: event["phase"] == "version")
        assert client.get("/health")["version"] == number
        ask()  # however slow the machine is, each version answers
    done.set()
    for thread in threads:
        thread.join()
    assert {status for status, *_ in answers} == {200}
    texts: dict[str, set[str]] = {}
    for _, fingerprint, text in answers:
        texts.setdefault(fingerprint, set()).add(text)
    # no answer is of two versions, and versions differ
    assert all(len(each) == 1 for each in texts.values())
    assert len(texts) >= swaps and len(set().union(*texts.values())) > len(texts) / 2
    # an answer that runs keeps the version that it began with
    assert {event["system_fingerprint"] for event in events} == {begun} == {f"version-{first}"}


def test_a_version_that_does_not_fit_is_told_and_the_one_before_stays(running: Running) -> None:
    client, number = running.client, running.client.get("/health")["version"]
    fitting = version(running.facts, number + 1)
    layers = (0, 3)
    factors = {place: value for place, value in fitting.factors.items() if place[0] in layers}
    learned.write(fitting._replace(layers=layers, factors=factors), running.adapter)
    refused = running.command.phase("refused")
    assert "was learned on 2 layers, but the base that is loaded has 4" in refused["text"]
    assert client.get("/health")["version"] == number and client.ask("completions", **GREEDY)[0] == 200
    learned.write(fitting._replace(version=number + 2), running.adapter)
    assert running.command.phase("version")["version"] == number + 2


@pytest.mark.parametrize(
    ("backend", "weights"),
    [("torch", "bfloat16"), ("torch", "q4_1"), ("onnx", "float32"), ("onnx", "q4_1")],
)
def test_the_prediction_is_near_the_servers_peak(
    real_model: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    weights: Weights,
) -> None:
    """Of full contexts, with three versions in memory: of an answer that runs, of new ones, and one more."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(cache))
    for name, value in processes.TRAINER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    facts, context, depth = processes.prepared(real_model, Path()), 1024, 10
    fleet = settings.parse({"fleet": {"name": "f"}, "catalog": [{"source": real_model, "depth": depth}]})
    serving = Serving(context, 2, processes.onnx_bytes())
    workload = Workload(fleet, facts, processes.runtime_bytes(), serving)
    plan = Plan(
        real_model, facts.model_class, depth, facts.layers, weights, 16, 1, 64, {}, 0.0, server=backend
    )
    layers, adapter = kept_layers(depth, facts.layers), tmp_path / "adapter"
    learned.write(version(facts, 1, layers, rank=16), adapter)
    more = ("--adapter", str(adapter), "--weights", weights, "--context", str(context), "--backend", backend)
    with server(Path(real_model), cache, *more) as (command, client):
        prompt = {"prompt": [50] * (context - 8), "max_tokens": 8}
        for number in (2, 3):
            threads = [
                threading.Thread(target=client.ask, args=("completions",), kwargs=prompt) for _ in "12"
            ]
            for thread in threads:
                thread.start()
            learned.write(version(facts, number, layers, rank=16), adapter)
            command.phase("version")
            for thread in threads:
                thread.join()
        measured = resident_bytes(command, "VmHWM")
    assert 0.9 < serving_bytes(workload, plan) / measured < 1.1
