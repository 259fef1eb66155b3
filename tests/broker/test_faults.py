"""Processes killed and brokers restarted during a transfer: each update counts once, and little is sent twice."""

import json
import random
import signal
import sqlite3
import time

import pytest
from edge_broker import files
from edge_broker.local import start_broker
from edge_broker.session import Session
from edge_broker.transfer import receive

PAYLOAD = random.Random(5).randbytes(3 << 20)
CHUNK = 16 * 1024
CHUNKS = len(PAYLOAD) // CHUNK

# A device whose process is killed right before it publishes a given chunk; 0 kills nowhere. Prints the outcome.
DEVICE = """
import json, os, signal, sys, time
from pathlib import Path
from edge_broker import messages, signing, store
from edge_broker.outbox import Outbox
from edge_broker.session import Session
from edge_broker.transfer import Uploader
url, fleet, folder, die_at = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
session = Session(url, fleet + "-d")
sent = 0
def publish(topic, payload, publish=session.publish_nowait, **options):
    global sent
    if "/up/" in topic:
        if sent + 1 == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done = publish(topic, payload, **options)
        sent += done
        return done
    return publish(topic, payload, **options)
session.publish_nowait = publish
outbox = Outbox(store.connect(folder / "d.sqlite"), folder / "d")
session.connect(60)
uploader = Uploader(session, outbox, fleet, "d", signing.load_or_create_key(folder / "d.key"))
uploader.start()
if len(sys.argv) > 5:
    payload, began = Path(sys.argv[5]), time.monotonic()
    origin = messages.Origin(fleet=fleet, device="d", round=1, model_class="m", codec="raw", samples=1)
    manifest = messages.describe(payload, origin, int(sys.argv[6]))
    outbox.add(manifest, payload)
else:
    began = time.monotonic()
result, due_s = None, 0.0
while result is None:
    result = uploader.handle(session.receive(due_s))
    due_s = min(uploader.tick(), 1.0)
print(json.dumps({"kind": type(result).__name__, "sent": sent, "seconds": time.monotonic() - began}), flush=True)
"""

# A node whose process is killed when a given number of chunks is in its journal. Prints "ready" and each commit.
NODE = """
import os, signal, sys
from pathlib import Path
from edge_broker import signing, store
from edge_broker.journal import Journal
from edge_broker.session import Session
from edge_broker.transfer import Receiver
url, fleet, folder, die_at = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
journal = Journal(store.connect(folder / "node.sqlite"), folder / "node")
written = 0
def write(*arguments, write=journal.write):
    global written
    new = write(*arguments)
    written += 1
    if written == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return new
journal.write = write
key = signing.public_key(signing.load_or_create_key(folder / "d.key"))
with Session(url, fleet + "-n", session_expiry_s=0) as session:
    session.connect(60)
    receiver = Receiver(session, journal, fleet, "n", lambda manifest: None, {"d": key}.get)
    receiver.start()
    print("ready", flush=True)
    while True:
        done = receiver.handle(session.receive(min(receiver.tick(), 1.0)))
        if done:
            receiver.commit(done.manifest.transfer)
            print("committed", flush=True)
"""


@pytest.fixture
def payload_file(tmp_path):
    (tmp_path / "payload").write_bytes(PAYLOAD)
    return tmp_path / "payload"


def counted(n):
    (update,) = n.journal.committed(1)
    return update.payload.read_bytes()


def test_a_megabyte_between_two_processes_takes_less_than_300_ms(broker, child, fleet, tmp_path):
    (tmp_path / "payload").write_bytes(PAYLOAD[: 1 << 20])
    node = child(NODE, broker.url, fleet, tmp_path, 0)
    assert node.stdout.readline() == "ready\n"
    outcome = json.loads(
        child(DEVICE, broker.url, fleet, tmp_path, 0, tmp_path / "payload", 65536).stdout.readline()
    )
    assert outcome["kind"] == "Committed" and outcome["sent"] == 16
    assert outcome["seconds"] < 0.3


def test_a_device_killed_between_chunks_and_started_again_counts_once(
    broker, child, fleet, tmp_path, payload_file, node, device, drive
):
    keys_from = device("d")  # enrols the key that the processes below use
    keys_from.session.close()
    n = node()
    first = child(DEVICE, broker.url, fleet, tmp_path, 60, payload_file, CHUNK)
    drive(lambda: first.poll() is not None, n)
    assert first.returncode == -signal.SIGKILL and n.journal.committed(1) == []
    second = child(DEVICE, broker.url, fleet, tmp_path, 0)
    drive(lambda: n.complete, n)
    drive(lambda: second.poll() is not None, n)
    outcome = json.loads(second.stdout.readline())
    assert outcome["kind"] == "Committed" and counted(n) == PAYLOAD and len(n.complete) == 1
    assert outcome["sent"] <= CHUNKS - 51  # of 59 sent all but the 8 unanswered had reached the broker


def test_a_node_killed_between_chunks_and_started_again_gets_only_what_it_misses(
    broker, child, fleet, tmp_path, node, device, drive
):
    d = device("d")
    first = child(NODE, broker.url, fleet, tmp_path, 100)
    assert first.stdout.readline() == "ready\n"
    d.add(PAYLOAD, chunk_bytes=CHUNK)
    drive(lambda: first.poll() is not None, d)
    n = node()
    drive(lambda: d.results, d, n)
    assert counted(n) == PAYLOAD
    flushed = 96  # sixteen at a time
    duplicates = 16  # a window from the broker, one from the device
    assert CHUNKS - flushed <= n.chunks <= CHUNKS - flushed + duplicates


def test_a_node_killed_before_its_first_flush_gets_everything_again(
    broker, child, fleet, tmp_path, node, device, drive
):
    d = device("d")  # the twin: without a flush there is nothing to build on
    first = child(NODE, broker.url, fleet, tmp_path, 10)
    assert first.stdout.readline() == "ready\n"
    d.add(PAYLOAD, chunk_bytes=CHUNK)
    drive(lambda: first.poll() is not None, d)
    n = node()
    drive(lambda: d.results, d, n)
    assert counted(n) == PAYLOAD and n.chunks >= CHUNKS


def test_a_node_killed_between_commit_and_receipt_sends_the_receipt_later(device, node, drive, impatient):
    d, n = device(), node()
    n.hold = True
    manifest = d.add(PAYLOAD[:1000])
    drive(lambda: n.complete, d, n)
    n.journal.commit(manifest.transfer)
    n.session.close()
    again = node()
    drive(lambda: d.results, d, again)
    assert type(d.results[0]).__name__ == "Committed" and again.chunks == 0
    assert len(again.journal.committed(1)) == 1


def test_a_node_killed_before_the_commit_is_handed_the_update_again(device, node, drive, impatient):
    d, n = device(), node()
    n.hold = True
    d.add(PAYLOAD[:1000])
    drive(lambda: n.complete, d, n)
    n.session.close()
    again = node()
    drive(lambda: d.results, d, again)
    assert len(again.complete) == 1 and again.chunks == 0 and counted(again) == PAYLOAD[:1000]


@pytest.mark.parametrize("broken", ["sync", "open"])
def test_a_full_disk_makes_devices_wait(device, node, drive, impatient, monkeypatch, broken):
    monkeypatch.setattr(receive, "_DISK_FULL_S", 0.1)
    d, n = device(), node()
    d.add(PAYLOAD)
    owner = {"sync": files, "open": n.journal}[broken]
    whole, times = getattr(owner, broken), iter(range(3))

    def full(what):
        if (
            what != n.journal.payload("") and next(times, None) is not None
        ):  # of a transfer, not of the folder
            raise sqlite3.OperationalError("database or disk is full")
        return whole(what)

    monkeypatch.setattr(owner, broken, full)
    drive(lambda: d.results, d, n)
    assert type(d.results[0]).__name__ == "Committed" and next(times, None) is None
    assert counted(n) == PAYLOAD


def test_a_broker_restarted_without_its_memory(broker, tmp_path, device, node, drive, impatient):
    running = start_broker(state_dir=tmp_path / "first", kind=broker.kind)
    with (
        Session(running.url, "d") as down,
        Session(running.url, "n", session_expiry_s=0) as up,
    ):
        down.connect(60)
        up.connect(60)
        d, n = device("d", session=down), node(session=up)
        d.add(PAYLOAD, chunk_bytes=CHUNK)
        drive(lambda: n.chunks >= 50, d, n)
        running.stop()
        assert not n.complete
        with start_broker(running.port, state_dir=tmp_path / "second", kind=broker.kind):
            drive(lambda: d.results, d, n)
            assert counted(n) == PAYLOAD and len(n.complete) == 1


def test_a_line_cut_again_and_again(relay, device, node, drive, open_session):
    d, n = device("d", session=open_session("d", url=relay.url)), node()
    d.add(PAYLOAD, chunk_bytes=CHUNK)
    for threshold in (30, 90, 150):
        drive(lambda threshold=threshold: n.chunks >= threshold, d, n)
        relay.cut()
    drive(lambda: d.results, d, n)
    assert counted(n) == PAYLOAD and len(n.complete) == 1


def test_chunks_under_way_are_bounded_even_if_the_node_does_not_look(device, node, drive):
    d, n = device(), node()
    d.add(PAYLOAD, chunk_bytes=CHUNK)
    drive(lambda: n.chunks, d, n)
    sent = []
    d.session.publish_nowait = (lambda publish: lambda *a, **k: publish(*a, **k) and not sent.append(a[0]))(
        d.session.publish_nowait
    )
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        d.turn()
    assert sum("/up/" in topic for topic in sent) < 64  # one grant, then it waits for the node
    drive(lambda: d.results, d, n)
    assert sum("/up/" in topic for topic in sent) >= CHUNKS - 64
