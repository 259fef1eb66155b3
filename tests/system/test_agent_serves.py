"""An agent that serves what it learns: versions, a killed server, a hook, and a round that none of them delays."""

import http.client
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import psutil
import pytest
from edge_broker.local import free_port
from fleet import Command, Fleet, eventually
from records import committed
from serving import Client, chatting, events_of

ASKED = {"prompt": "say 3: ", "max_tokens": 5, "temperature": 0}
LONG = {"prompt": "say 3: ", "max_tokens": 1800, "temperature": 0, "stream": True}


def served(agent: Command) -> psutil.Process:
    """The agent's server, once it listens."""
    agent.until(lambda event: event["phase"] == "serving" and "at http" in event["text"])
    (server,) = (
        process for process in psutil.Process(agent.process.pid).children() if "serve" in process.cmdline()
    )
    return server


def told(agent: Command, words: str) -> None:
    """Wait for an event with these words, unless it has come before."""
    if not any(words in event.get("text", "") for event in agent.seen):
        agent.until(lambda event: words in event.get("text", ""))


def test_an_agent_serves_what_it_learns(fleet: Fleet, tiny_model: Path, tmp_path: Path) -> None:
    fleet.write((str(chatting(tiny_model, tmp_path / "tiny")), 4))
    node, client = fleet.node(), Client(free_port())
    folders = tmp_path / "folders"
    hook = shlex.join(
        [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')", str(folders)]
    )
    agent = fleet.agent("serving", "--serve", str(client.port), "--on-version", hook)
    server = served(agent)
    told(agent, "served by ONNX Runtime")
    assert server.cmdline()[server.cmdline().index("--backend") + 1] == "onnx"
    assert client.ask("completions", **ASKED)[1]["system_fingerprint"] in ("version-0", "version-1")
    # a server that dies in an answer costs that answer, and no round
    running = events_of(client.begin("completions", **LONG))
    next(running)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises((AssertionError, OSError, http.client.HTTPException)):
        list(running)
    again = agent.until(lambda event: "starts again in" in event.get("text", ""))
    assert "the server ended with exit code -9; it starts again in 1 s" in again["text"]
    server = served(agent)
    told(agent, "the adapter is in")
    assert committed(fleet) == [("serving", 1)] and node.phase("merged")
    assert eventually(lambda: client.get("/health")["version"] == 1)
    told(agent, "--on-version has run for version 1")
    assert folders.read_text().splitlines() == [str(tmp_path / "serving" / "on-version" / "1")]
    # with the agent ends the server, after the answer that it writes
    running = events_of(client.begin("completions", **LONG | {"max_tokens": 300}))
    next(running)
    agent.process.send_signal(signal.SIGTERM)
    assert list(running)[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert agent.end() == 0 and not server.is_running()


def test_a_server_ends_with_an_agent_that_is_killed(fleet: Fleet, tiny_model: Path) -> None:
    """And an agent that starts again serves the version that it has, before it hears of its fleet."""
    fleet.write((str(tiny_model), 4))
    node, port = fleet.node(), free_port()
    agent = fleet.agent("killed", "--serve", str(port))
    server = served(agent)
    node.kill()
    agent.kill()
    assert eventually(lambda: not server.is_running())
    agent = fleet.agent("killed", "--serve", str(port))
    served(agent)
    about = fleet.folder / "killed" / "adapter" / "edge_runtime.json"
    # the round that the broker has retained may bring a newer version meanwhile
    assert eventually(
        lambda: Client(port).get("/health")["version"] == json.loads(about.read_text())["version"]
    )
