"""What a hostile or broken device says is refused with its reason; the node goes on without it."""

import msgspec
import numpy as np
import pytest
from crafted import crafted
from edge_broker import topics
from edge_broker.transfer import Rejected
from fleet import Fleet
from records import committed, master, sent, version_0

from edge_runtime.protocol import codec, payload


def payload_of(key: str, shape: tuple[int, ...], step: float = 1.0) -> bytes:
    """An encoded tensor with its key and step replaced: the encoder refuses bad keys and steps."""
    header, (side, *others) = payload.read(codec.encode({"layers.0.q.A": np.ones(shape, np.float32)}))
    changed = np.float32(step).tobytes() + payload.expand(side, 5)[4:]
    header = msgspec.structs.replace(header, shapes={key: shape})
    return payload.assemble(header, [payload.compress(changed), *others])


def test_a_round_closes_with_the_honest_device_alone(fleet: Fleet, real_model: str) -> None:
    fleet.write((real_model, 2), rounds=1, deadline_s=60)
    node = fleet.node("--until-finished")
    node.phase("collecting")
    honest = fleet.agent("honest", "--until-finished")
    with crafted(fleet, "hostile") as hostile:
        hostile.report()
        refusal = hostile.offer(payload_of("layers.0.q.A", (3, 576)), model_class="anything")
        assert isinstance(refusal, Rejected) and "rank 2" in refusal.reason
        hostile.report(state="failed", cause="refused")  # else the round waits for it until its deadline
        merged = node.phase("merged")
    assert merged["in_"] == ["honest"] and merged["missing"] == ["hostile"]
    assert (node.end(), honest.end()) == (0, 0)
    assert committed(fleet) == [("honest", 1)]
    delta = sent(fleet, "honest", 1)
    for key, value in master(fleet, 1).items():
        np.testing.assert_allclose(value, version_0(key, value.shape) + delta[key], atol=1e-6)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (payload_of("layers.0.q.A", (2, 8), np.nan), "step"),
        (payload_of("layers.0.q.A", (2, 8), np.inf), "step"),
        (payload_of("layers.0.q.A", (2, 8), -1.0), "step"),
        (payload_of("layers.00.q.A", (2, 8)), "layers.00.q.A"),
        (codec.encode({}), "no factor"),
    ],
)
def test_a_delta_that_says_nothing_sound_is_refused(fleet: Fleet, content: bytes, reason: str) -> None:
    fleet.write()
    node = fleet.node()
    node.phase("collecting")
    with crafted(fleet, "hostile") as hostile:
        hostile.report()
        refusal = hostile.offer(content)
    assert isinstance(refusal, Rejected) and reason in refusal.reason
    assert reason in node.phase("refused")["text"]


def test_an_update_without_samples_cannot_break_the_mean(fleet: Fleet) -> None:
    fleet.write()
    node = fleet.node()
    node.phase("collecting")
    with crafted(fleet, "hostile") as hostile:
        hostile.report()
        refusal = hostile.offer(payload_of("layers.0.q.A", (2, 8)), samples=0)
        assert isinstance(refusal, Rejected) and "samples" in refusal.reason
        hostile.offer(payload_of("layers.0.q.A", (2, 8)))
        node.phase("merged")
    assert committed(fleet) == [("hostile", 1)]


@pytest.mark.parametrize("round_", [2**63, -1, 3])
def test_a_report_of_a_round_that_is_not_there_does_not_end_the_node(fleet: Fleet, round_: int) -> None:
    fleet.write(rounds=2)
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    with crafted(fleet, "hostile") as hostile:
        hostile.report(round=round_, state="trained")
    honest = fleet.noise("honest", "10kB", "--until-finished")
    assert (honest.end(30), node.end(30)) == (0, 0)


def test_messages_that_are_no_messages_do_not_end_the_node(fleet: Fleet) -> None:
    fleet.write()
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    nested = b'{"unknown":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    unsigned = msgspec.json.encode({"body": "{}", "key": "", "signature": ""})
    with crafted(fleet, "hostile") as hostile:
        for topic in (
            topics.report(fleet.name, "hostile"),
            topics.presence(fleet.name, "other"),
            topics.offer(fleet.name, "hostile"),
            topics.want(fleet.name, "hostile"),
            topics.up(fleet.name, "node", "hostile", "x"),
        ):
            for body in (b"", b"\xff\xfe", b"{}", b"[" * 100_000, nested, unsigned):
                hostile.session.publish(topic, body)
    honest = fleet.noise("honest", "10kB", "--until-finished")
    assert (honest.end(30), node.end(30)) == (0, 0)
    assert committed(fleet) == [("honest", 1)]


def test_a_device_whose_name_is_taken_hears_why_it_does_not_count(fleet: Fleet) -> None:
    fleet.write()
    node = fleet.noise_node()
    node.phase("collecting")
    with crafted(fleet, "name") as impostor:
        impostor.report()
    agent = fleet.noise("name", "10kB")
    agent.until(lambda event: event["phase"] == "waiting" and "signed by key" in event["text"], 30)
    assert committed(fleet) == []
