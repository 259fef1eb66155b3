import pytest
from edge_broker import topics
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.topics import Topic

DIGEST = "0123456789abcdef" * 4

EVERY = [
    (topics.round("f"), Topic("round", "f"), "edge/1/f/round"),
    (topics.node("f"), Topic("node", "f"), "edge/1/f/node"),
    (topics.presence("f", "d"), Topic("presence", "f", device="d"), "edge/1/f/device/d/presence"),
    (topics.inbox("f", "d", "t"), Topic("inbox", "f", device="d", transfer="t"), "edge/1/f/device/d/inbox/t"),
    (topics.report("f", "d"), Topic("report", "f", device="d"), "edge/1/f/device/d/report"),
    (topics.offer("f", "d"), Topic("offer", "f", device="d"), "edge/1/f/offer/d"),
    (
        topics.up("f", "n", "d", "t"),
        Topic("up", "f", device="d", node="n", transfer="t"),
        "edge/1/f/node/n/up/d/t",
    ),
    (topics.want("f", "d"), Topic("want", "f", device="d"), "edge/1/f/want/d"),
    (
        topics.artifact("f", DIGEST, 7),
        Topic("artifact", "f", digest=DIGEST, chunk=7),
        f"edge/1/f/artifact/{DIGEST}/7",
    ),
]


@pytest.mark.parametrize(("built", "parsed", "text"), EVERY)
def test_every_topic_is_built_and_parsed(built, parsed, text):
    assert built == text
    assert topics.parse(text) == parsed
    assert text.count("/") <= 7


def test_filters_hold_the_wildcards():
    assert topics.presence("f", topics.ANY) == "edge/1/f/device/+/presence"
    assert topics.inbox("f", "d", topics.ANY) == "edge/1/f/device/d/inbox/+"
    assert topics.report("f", topics.ANY) == "edge/1/f/device/+/report"
    assert topics.all_offers("f") == "$share/nodes/edge/1/f/offer/+"
    assert topics.up("f", "n", topics.ANY, topics.ANY) == "edge/1/f/node/n/up/+/+"
    assert topics.want("f", topics.ANY) == "edge/1/f/want/+"
    assert topics.artifact("f", DIGEST, topics.ANY) == f"edge/1/f/artifact/{DIGEST}/+"


@pytest.mark.parametrize("bad", ["", "a/b", "a b", "a+", "#", "é", "x" * 65, "a\n", ".", ".."])
def test_a_bad_name_is_shown_with_what_is_needed(bad):
    with pytest.raises(BrokerError) as error:
        topics.round(bad)
    assert repr(bad) in str(error.value) and "1-64 characters" in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [
        "edge/1/f",
        "edge/2/f/round",
        "edge/1/f/rounds",
        "edge/1/f/offer/a b",
        "edge/1//round",
        f"edge/1/f/artifact/{DIGEST}/-1",
        f"edge/1/f/artifact/{DIGEST}/1234567890",
        "edge/1/f/artifact/ab/1",
    ],
)
def test_other_topics_are_bad_messages(bad):
    with pytest.raises(BadMessage, match="topic"):
        topics.parse(bad)
