"""What an agent makes of a state folder that it is given, and of a round that it hears of again."""

import msgspec
import pytest
from edge_broker import signing

from edge_runtime import settings
from edge_runtime.agent.agent import Agent
from edge_runtime.agent.options import Options
from edge_runtime.errors import InputError
from edge_runtime.rounds import ROUND_DOMAIN, Round
from edge_runtime.state import alone


@pytest.fixture
def agent(tmp_path):
    started = []

    def start(**changes):
        options = Options(
            broker="mqtt://127.0.0.1:1",
            fleet="f",
            id="a",
            data=tmp_path / "none",
            state=tmp_path / "state",
            budget_bytes=1 << 30,
            evaluation={},
            models=tmp_path,
            threads=1,
            device="cpu",
            gpu_cap_bytes=None,
            wait_s=1.0,
            until_finished=False,
            noop_bytes=16,
        )
        started.append(Agent(options._replace(**changes), lambda _: None))
        return started[-1]

    yield start
    for one in started:
        one._store.connection.close()


@pytest.mark.parametrize(("other", "named"), [({"id": "b"}, "id `a`, not `b`"), ({"fleet": "g"}, "fleet `f`, not `g`")])
def test_the_state_of_another_device_is_refused(agent, other, named):
    agent()
    with pytest.raises(InputError, match=f"is that of {named}: give another --state, or --"):
        agent(**other)
    agent()


def test_a_round_whose_version_could_not_be_had_is_tried_again_when_it_is_announced_again(agent, tmp_path, monkeypatch):
    """As a node does that was away for longer than its devices ask."""
    one, begun, said = agent(), [], []
    monkeypatch.setattr(one, "_plan", lambda: begun.append(1))
    monkeypatch.setattr(one._reports, "publish", lambda report: said.append(report.state))
    fleet = settings.Fleet("f", (settings.Model("m"),))
    body = msgspec.json.encode(Round(node="n", fleet=fleet, round=2, state="open", versions={}))
    payload = signing.sign(signing.load_or_create_key(tmp_path / "node.key"), ROUND_DOMAIN, body).encode()
    one._on_round(payload)
    one._on_round(payload)
    assert len(begun) == 1
    one._unfetched("no chunk came")
    assert said == ["failed"]
    one._on_round(payload)
    assert len(begun) == 2


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    state, refused = tmp_path / "state", r"another process works in .*state: end it first"
    with alone(state), pytest.raises(InputError, match=refused), alone(state):
        raise AssertionError("both hold it")
    with alone(state):
        pass
