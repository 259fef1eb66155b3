"""A global adapter from the node to its devices: fetched by digest, published once for all who ask together."""

import hashlib
import random

import pytest
from edge_broker import messages, session, topics
from edge_broker.errors import BrokerError
from edge_broker.events import Message
from edge_broker.transfer import Failed, Fetched, Fetcher, download

CONTENT = random.Random(9).randbytes(3 << 20)


class Reader:
    """A device that fetches; result is what the fetcher returned, chunks counts those that arrived."""

    def __init__(self, session, fleet, name, folder):
        self.session, self.fetcher = session, Fetcher(session, fleet, name, folder / name)
        self.result, self.chunks = None, 0

    def fetch(self, artifact):
        self.result = self.fetcher.fetch(artifact)

    def turn(self):
        message = self.session.receive(0.0003)
        self.chunks += isinstance(message, Message)
        self.result = self.fetcher.handle(message) or self.result
        self.fetcher.tick()


@pytest.fixture
def reader(open_session, fleet, tmp_path):
    return lambda name="r": Reader(open_session(name), fleet, name, tmp_path)


@pytest.fixture
def artifact_file(tmp_path):
    (tmp_path / "global.bin").write_bytes(CONTENT)
    return tmp_path / "global.bin"


def test_one_device_fetches_and_has_it_from_then_on(reader, node, drive, artifact_file):
    r, n = reader(), node()
    artifact = n.publisher.serve(artifact_file)
    assert artifact == messages.Artifact(
        digest=hashlib.sha256(CONTENT).hexdigest(), size=3 << 20, chunk_bytes=65536, chunks=48
    )
    r.fetch(artifact)
    drive(lambda: r.result, r, n)
    assert isinstance(r.result, Fetched) and r.result.path.read_bytes() == CONTENT
    assert n.published == 48
    assert r.fetcher.fetch(artifact) == r.result  # from the folder, without a word to the node
    assert [file.name for file in r.result.path.parent.iterdir()] == [artifact.digest]


def test_devices_that_ask_together_are_served_by_about_one_publication(reader, node, drive, artifact_file):
    readers, n = [reader("r1"), reader("r2")], node()
    artifact = n.publisher.serve(artifact_file)
    for r in readers:
        r.fetch(artifact)
    drive(lambda: all(r.result for r in readers), n, *readers)
    assert all(r.result.path.read_bytes() == CONTENT for r in readers)
    assert 48 <= n.published <= 48 * 1.25


def test_devices_that_ask_one_after_the_other_cost_two(reader, node, drive, artifact_file):
    readers, n = [reader("r1"), reader("r2")], node()  # the twin: the count above can be higher
    artifact = n.publisher.serve(artifact_file)
    for r in readers:
        r.fetch(artifact)
        drive(lambda r=r: r.result, n, r)
    assert n.published == 2 * 48


def test_a_latecomer_takes_the_rest_along_and_gets_what_it_missed(
    reader, node, drive, artifact_file, monkeypatch
):
    monkeypatch.setattr(session, "_CHUNK_BYTES", 8192)
    readers, n = [reader("r1"), reader("r2")], node()
    artifact = n.publisher.serve(artifact_file)
    readers[0].fetch(artifact)
    drive(lambda: n.published >= 100, n, readers[0])
    missed = n.published
    readers[1].fetch(artifact)
    drive(lambda: all(r.result for r in readers), n, *readers)
    assert all(r.result.path.read_bytes() == CONTENT for r in readers)
    assert artifact.chunks + missed <= n.published < 2 * artifact.chunks  # fewer than one by one


def test_more_chunks_than_are_asked_for_at_once(reader, node, drive, artifact_file, monkeypatch):
    monkeypatch.setattr(session, "_CHUNK_BYTES", 4096)
    r, n = reader(), node()
    artifact = n.publisher.serve(artifact_file)
    assert artifact.chunks > 2 * download.CREDIT
    r.fetch(artifact)
    drive(lambda: r.result, r, n)
    assert r.result.path.read_bytes() == CONTENT and n.published == artifact.chunks


def test_a_chunk_that_was_lost_is_asked_for_again(reader, node, drive, artifact_file, monkeypatch):
    monkeypatch.setattr(download, "retry_s", lambda tries: 3.0)
    r, n = reader(), node()
    artifact = n.publisher.serve(artifact_file)
    publish, lost = n.session.publish_nowait, []

    def lossy(topic, payload, **options):
        if topic.endswith("/7") and not lost:
            lost.append(topic)
            n.published += 1
            return True
        return publish(topic, payload, **options)

    n.session.publish_nowait = lossy
    r.fetch(artifact)
    drive(lambda: r.chunks == 47, r, n)
    assert not r.result
    drive(lambda: r.result, r, n)
    assert r.result.path.read_bytes() == CONTENT and n.published == 49


def test_nobody_who_serves_it_is_said_after_a_bounded_number_of_asks(
    reader, node, drive, artifact_file, monkeypatch
):
    monkeypatch.setattr(download, "retry_s", lambda tries: 0.02)
    r, n = reader(), node()
    artifact = n.publisher.serve(artifact_file)
    n.publisher.withdraw(artifact.digest)
    r.fetch(artifact)
    drive(lambda: r.result, r, n)
    assert r.result == Failed(artifact=artifact, reason="no chunk came after asking 8 times")
    assert list((artifact_file.parent / "r").iterdir()) == []


def test_wrong_bytes_are_fetched_once_more_and_then_refused(reader, node, drive, artifact_file, monkeypatch):
    r, n = reader(), node()
    artifact = n.publisher.serve(artifact_file)
    artifact_file.write_bytes(CONTENT[::-1])
    r.fetch(artifact)
    drive(lambda: r.result, r, n)
    assert isinstance(r.result, Failed) and "the bytes have SHA-256" in r.result.reason
    assert n.published == 2 * 48


def test_a_newer_artifact_takes_the_place_of_the_one_under_way(reader, node, drive, artifact_file, tmp_path):
    r, n = reader(), node()
    (tmp_path / "next.bin").write_bytes(CONTENT[:100_000])
    old, new = n.publisher.serve(artifact_file), n.publisher.serve(tmp_path / "next.bin")
    r.fetch(old)
    r.fetch(new)
    drive(lambda: r.result, r, n)
    assert r.result.artifact == new and r.result.path.read_bytes() == CONTENT[:100_000]


def test_a_chunk_that_does_not_fit_is_ignored(reader, node, drive, artifact_file, fleet, open_session):
    r, n = reader(), node()
    artifact = n.publisher.serve(artifact_file)
    r.fetch(artifact)
    stranger = open_session("stranger")
    for index, data in [(0, b"short"), (48, bytes(65536)), (999, b"x")]:
        stranger.publish(topics.artifact(fleet, artifact.digest, index), data)
    drive(lambda: r.result, r, n)
    assert r.result.path.read_bytes() == CONTENT


@pytest.mark.parametrize("changes", [{"chunks": 2}, {"size": 2 << 30, "chunks": 32768}, {"chunk_bytes": 1}])
def test_a_pointer_that_cannot_be_right_is_refused_before_anything_is_allocated(reader, tmp_path, changes):
    fields = {"digest": "0" * 64, "size": 3 << 20, "chunk_bytes": 65536, "chunks": 48} | changes
    with pytest.raises(BrokerError, match="add up"):
        reader().fetch(messages.Artifact(**fields))
    assert list((tmp_path / "r").iterdir()) == []
