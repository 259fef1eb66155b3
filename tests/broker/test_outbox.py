import sqlite3

import pytest
from edge_broker import store
from edge_broker.errors import BrokerError
from edge_broker.outbox import Outbox


@pytest.fixture
def opened(tmp_path):
    return lambda name="box": Outbox(store.connect(tmp_path / f"{name}.sqlite"), tmp_path)


@pytest.fixture
def outbox(opened):
    return opened()


@pytest.fixture
def delta(tmp_path):
    (tmp_path / "delta").write_bytes(b"delta")
    return tmp_path / "delta"


@pytest.fixture
def describe_one(describe):
    return lambda payload=b"delta", round=1: describe(payload, "f", round=round)


def test_it_is_there_after_a_restart_until_it_is_settled(outbox, opened, describe_one, delta):
    first, second = (outbox.add(describe_one(), delta), outbox.add(describe_one(round=2), delta))
    again = opened()
    assert again.pending() == [first, second] and again.pending(limit=1) == [first]
    assert again.payload(first.transfer).read_bytes() == b"delta"
    again.settle(first.transfer, "committed")
    again.settle(second.transfer, "rejected", "size", "too large")
    again.settle(first.transfer, "rejected", "late", "a settled one stays as it is")
    states = again._database.execute("SELECT state FROM outbox_update ORDER BY sequence").fetchall()
    assert again.pending() == [] and states == [("committed",), ("rejected",)]


def test_sequence_numbers_only_grow(outbox, opened, describe_one, delta, monkeypatch):
    numbers = [outbox.add(describe_one(), delta).sequence for _ in range(3)]
    monkeypatch.setattr("time.time_ns", lambda: 0)  # the clock went back
    numbers.append(opened().add(describe_one(), delta).sequence)
    assert numbers == sorted(set(numbers))


def test_a_device_that_lost_its_state_goes_on_above_the_old_numbers(outbox, opened, describe_one, delta):
    before = outbox.add(describe_one(), delta).sequence
    assert opened("new").add(describe_one(), delta).sequence > before


def test_the_callers_changes_share_the_transaction(tmp_path, describe_one, delta):
    database = sqlite3.connect(tmp_path / "agent.sqlite")
    database.execute("CREATE TABLE residual (x)")
    outbox = Outbox(database, tmp_path)
    manifest = outbox.add(describe_one(), delta)
    with pytest.raises(RuntimeError), outbox.transaction():
        outbox.settle(manifest.transfer, "committed")
        database.execute("INSERT INTO residual VALUES (1)")
        raise RuntimeError
    assert outbox.pending() == [manifest]
    with outbox.transaction():
        outbox.settle(manifest.transfer, "committed")
        database.execute("INSERT INTO residual VALUES (1)")
    other = sqlite3.connect(tmp_path / "agent.sqlite")
    assert other.execute("SELECT count(*) FROM residual").fetchone() == (1,)
    assert other.execute("SELECT state FROM outbox_update").fetchone() == ("committed",)


def test_a_file_of_the_caller_is_neither_moved_nor_deleted(outbox, describe_one, delta):
    manifest = outbox.add(describe_one(), delta)
    assert outbox.payload(manifest.transfer) == delta
    outbox.settle(manifest.transfer, "committed")
    assert delta.exists()


def test_the_folder_may_move(outbox, tmp_path, describe_one):
    file = tmp_path / "work" / "delta.bin"
    file.parent.mkdir()
    file.write_bytes(b"delta")
    inside = outbox.add(describe_one(), file)
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    again = Outbox(store.connect(moved / "box.sqlite"), moved)
    assert again.payload(inside.transfer).read_bytes() == b"delta"
    outside = tmp_path / "delta.bin"
    outside.parent.mkdir()
    outside.write_bytes(b"delta")
    assert again.payload(again.add(describe_one(round=3), outside).transfer) == outside


def test_what_does_not_fit_its_manifest_is_refused(outbox, tmp_path, describe_one, delta):
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(BrokerError, match="has 3 bytes, its manifest says 5"):
        outbox.add(describe_one(), tmp_path / "short")
    manifest = describe_one()
    outbox.add(manifest, delta)
    with pytest.raises(BrokerError, match="already in the outbox"):
        outbox.add(manifest, delta)
    with pytest.raises(BrokerError, match="is not in the outbox"):
        outbox.payload("nothing")
