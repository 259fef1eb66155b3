import hashlib
import json

import msgspec
import pytest
from edge_broker import chunks, messages
from edge_broker.errors import BadMessage, BrokerError

ORIGIN = messages.Origin(fleet="f", device="d", round=1, model_class="m", codec="c", samples=3)
PAYLOAD = b"x" * 100
GOOD = messages.Manifest(
    **{name: getattr(ORIGIN, name) for name in ORIGIN.__struct_fields__},
    transfer="t",
    sequence=0,
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    size=100,
    chunk_bytes=30,
    chunks=4,
)


def test_describe_measures_the_payload(tmp_path):
    (tmp_path / "payload").write_bytes(PAYLOAD)
    described = messages.describe(tmp_path / "payload", ORIGIN, chunk_bytes=30)
    assert msgspec.structs.replace(described, transfer="t") == GOOD
    assert [chunks.size_of(GOOD, index) for index in range(4)] == [30, 30, 30, 10]


def test_nothing_cannot_be_described(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(BrokerError, match="is empty"):
        messages.describe(tmp_path / "empty", ORIGIN, chunk_bytes=30)


def test_unknown_fields_are_for_newer_readers():
    body = json.dumps(json.loads(messages.encode(GOOD)) | {"colour": "red"})
    assert messages.decode(body, messages.Manifest) == GOOD


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("size", "100"),
        ("size", 2**60),
        ("round", -1),
        ("sha256", "ab"),
        ("sha256", GOOD.sha256 + "\n"),
        ("device", "a/b"),
        ("device", "d\n"),
        ("transfer", ""),
        ("chunks", None),
    ],
)
def test_a_field_out_of_range_is_a_bad_message(field, value):
    body = json.dumps(json.loads(messages.encode(GOOD)) | {field: value})
    with pytest.raises(BadMessage, match=f"not a Manifest: .*{field}"):
        messages.decode(body, messages.Manifest)


@pytest.mark.parametrize("bad", [b"", b"{", b"\xff", b"[]", b"[" * 100_000])
def test_what_is_not_json_is_a_bad_message(bad):
    with pytest.raises(BadMessage):
        messages.decode(bad, messages.Manifest)
    with pytest.raises(BadMessage, match="neither grant, pause, receipt nor reject"):
        messages.decode_inbox(bad)


def test_an_inbox_message_says_what_it_is():
    for message in [
        messages.Grant(transfer="t", node="n", window=8, missing=[(0, 3), (7, 7)]),
        messages.Pause(transfer="t", seconds=2.0),
        messages.Receipt(transfer="t", round=4),
        messages.Reject(transfer="t", code="size", reason="too large", final=True),
    ]:
        body = messages.encode(message)
        assert json.loads(body)["type"] == type(message).__name__.lower()
        assert messages.decode_inbox(body) == message


def test_chunks_and_ranges_go_there_and_back():
    assert chunks.unpack(chunks.pack(70_000, b"abc")) == (70_000, b"abc")
    assert chunks.to_ranges([0, 1, 2, 5, 7, 8]) == [(0, 2), (5, 5), (7, 8)]
    assert list(chunks.from_ranges([(0, 2), (5, 5), (7, 8)], 9)) == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize("bad", [[(2, 1)], [(0, 9)], [(0, 0), (9, 9)]])
def test_ranges_outside_are_bad_messages(bad):
    with pytest.raises(BadMessage, match="of 9"):
        list(chunks.from_ranges(bad, 9))
