"""What an agent makes of a state folder that it is given, and of a round that it hears of again."""

from queue import Queue

import msgspec
import pytest
from edge_broker import address, signing
from edge_broker.transfer import Rejected

from edge_runtime import settings
from edge_runtime.agent.agent import Agent
from edge_runtime.agent.options import Options
from edge_runtime.agent.trainer import Trainer
from edge_runtime.errors import InputError
from edge_runtime.protocol.round import ROUND_DOMAIN, Round
from edge_runtime.state import alone


@pytest.fixture
def agent(tmp_path):
    started = []

    def start(**changes):
        options = Options(
            broker=address.parse("mqtt://127.0.0.1:1"),
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


@pytest.mark.parametrize(
    ("other", "named"), [({"id": "b"}, "id `a`, not `b`"), ({"fleet": "g"}, "fleet `f`, not `g`")]
)
def test_the_state_of_another_device_is_refused(agent, other, named):
    agent()
    with pytest.raises(InputError, match=f"is that of {named}: give another --state, or --"):
        agent(**other)
    agent()


def test_a_round_whose_version_could_not_be_had_is_tried_again_when_it_is_announced_again(
    agent, tmp_path, monkeypatch
):
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


@pytest.mark.parametrize("finished", [False, True])
def test_that_an_update_was_refused_is_kept_until_it_is_said(agent, finished, monkeypatch):
    """A kill may come right after the refusal was settled; after the last round the node waits for no such report."""
    one, said = agent(), []
    fleet = settings.Fleet("f", (settings.Model("m"),), rounds=1)
    one._round = Round(node="n", fleet=fleet, round=1, state="open", versions={})
    one._send_noise()
    (manifest,) = one._outbox.pending()
    one._round = msgspec.structs.replace(one._round, state="finished" if finished else "open")
    refusal = Rejected(manifest, "late", "round 1 is closed", True)
    with one._outbox.transaction():
        one._settled(refusal, None)
        one._outbox.reject(manifest.transfer, refusal.code, refusal.reason)
    one._store.connection.close()
    again = agent()
    monkeypatch.setattr(
        again._reports, "publish", lambda report: said.append((report.state, report.cause)) or True
    )
    again._reports.publish_owed()
    again._reports.publish_owed()
    assert said == ([] if finished else [("failed", "refused")])


def test_a_new_state_is_advised_where_it_would_help(agent, tmp_path):
    one = agent()
    one._on_round(b"{}")
    assert "not a signed message" in one._ignored and "--state" not in one._ignored
    one._store.set("node_key", "00" * 32)
    one._on_round(
        signing.sign(signing.load_or_create_key(tmp_path / "node.key"), ROUND_DOMAIN, b"{}").encode()
    )
    assert one._ignored.endswith("to trust that node, start with a new --state")


class NoJob(msgspec.Struct):
    """A trainer that reads it ends by itself."""

    fleet: settings.Fleet = settings.Fleet("none", ())


def test_a_trainers_end_is_told_though_its_last_words_are_gone(tmp_path):
    ended, folder = Queue(), tmp_path / "work"
    started = Trainer(NoJob(), folder, ended.put)  # type: ignore[arg-type]
    (folder / "stderr.log").unlink()
    end = ended.get(timeout=60)
    assert (end.pid, end.exit_code != 0) == (started.pid, True) and "stderr.log" in end.reason
