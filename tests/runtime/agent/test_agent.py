"""An agent on a state folder of another device, and on rounds it cannot use or hears of again."""

from queue import Queue

import msgspec
import pytest
from edge_broker import address, messages, signing, topics
from edge_broker.local import start_broker
from edge_broker.session import Session

from benchmarks import noise
from edge_runtime import settings
from edge_runtime.agent.agent import run
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.store import DeviceStore
from edge_runtime.agent.trainer import Trainer
from edge_runtime.errors import InputError, UnreachableError
from edge_runtime.protocol.round import ROUND_DOMAIN, Round
from edge_runtime.state import alone

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with start_broker(state_dir=tmp_path_factory.mktemp("broker")) as running:
        yield running.url


@pytest.fixture
def agent(tmp_path):
    def start(tell=lambda event: None, **changes):
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"text": "a"}\n')
        options = DeviceOptions(
            broker=address.parse("mqtt://127.0.0.1:1"),
            fleet="f",
            id="a",
            data=rows,
            state=tmp_path / "state",
            budget_bytes=1 << 30,
            evaluation={},
            models=tmp_path,
            threads=1,
            device="cpu",
            gpu_cap_bytes=None,
            wait_s=1.0,
            until_finished=False,
        )
        run(options._replace(**changes), tell, noise.workers("a", 16))

    return start


@pytest.mark.parametrize(
    ("changed", "named"), [({"id": "b"}, "id `a`, not `b`"), ({"fleet": "g"}, "fleet `f`, not `g`")]
)
def test_the_state_of_another_device_is_refused(agent, changed, named):
    with pytest.raises(UnreachableError):
        agent()
    with pytest.raises(InputError, match=f"is that of {named}: give another --state, or --"):
        agent(**changed)
    with pytest.raises(UnreachableError):
        agent()


def announcement(folder, fleet, **fields):
    """A round as its node signs it."""
    announced = Round(
        **{
            "node": "n",
            "fleet": settings.Fleet(fleet, (settings.Model("m"),)),
            "round": 2,
            "state": "open",
            "versions": {},
            **fields,
        }
    )
    key = signing.load_or_create_key(folder / "node.key")
    return signing.sign(key, ROUND_DOMAIN, msgspec.json.encode(announced))


def announce(broker, fleet, payload):
    with Session(broker, f"node-{fleet}", session_expiry_s=0) as session:
        session.connect(10)
        session.publish(topics.round(fleet), payload, retain=True)


def test_a_round_whose_version_could_not_be_had_is_tried_again_when_it_is_announced_again(
    agent, broker, tmp_path
):
    """As a node does that was away for longer than its devices ask."""
    too_large = messages.Artifact(digest="0" * 64, size=1 << 40, chunk_bytes=1 << 30, chunks=1 << 10)
    unavailable = announcement(tmp_path, "again", versions={noise.NOISE: (too_large,)})
    payloads = [unavailable, unavailable, announcement(tmp_path, "again", state="finished")]
    events = []

    def tell(event):
        events.append(event)
        if event.phase in ("connected", "failed"):
            announce(broker, "again", payloads.pop(0))

    agent(tell, broker=address.parse(broker), fleet="again", wait_s=TIMEOUT_S, until_finished=True)
    failed = [event for event in events if event.phase == "failed"]
    assert len(failed) == 2 and all("this device takes" in event.text for event in failed)
    assert events[-1].phase == "finished"


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    state, refused = tmp_path / "state", r"another process works in .*state: end it first"
    with alone(state), pytest.raises(InputError, match=refused), alone(state):
        raise AssertionError("both hold it")
    with alone(state):
        pass


def test_a_new_state_is_advised_where_it_would_help(agent, broker, tmp_path):
    announce(broker, "unsigned", b"{}")
    with pytest.raises(UnreachableError, match="not a signed message") as refused:
        agent(broker=address.parse(broker), fleet="unsigned", state=tmp_path / "unsigned")
    assert "--state" not in str(refused.value)
    state = tmp_path / "follower"
    store = DeviceStore(state / "agent.db")
    store.set("node_key", "00" * 32)
    store.connection.close()
    announce(broker, "other", announcement(tmp_path, "other"))
    with pytest.raises(UnreachableError, match=r"to trust that node, start with a new --state$"):
        agent(broker=address.parse(broker), fleet="other", state=state)


class NoJob(msgspec.Struct):
    """A trainer that reads it ends by itself."""

    fleet: settings.Fleet = settings.Fleet("none", ())


def test_a_trainers_end_is_told_though_its_last_words_are_gone(tmp_path):
    ended, folder = Queue(), tmp_path / "work"
    started = Trainer(NoJob(), folder, ended.put)  # type: ignore[arg-type]
    (folder / "stderr.log").unlink()
    end = ended.get(timeout=TIMEOUT_S)
    assert (end.pid, end.exit_code != 0) == (started.pid, True) and "stderr.log" in end.reason
