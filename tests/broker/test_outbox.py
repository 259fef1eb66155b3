import sqlite3

import pytest
from edge_broker.errors import BrokerError
from edge_broker.outbox import Outbox


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path / "box.sqlite", tmp_path)


@pytest.fixture
def describe_one(describe):
    return lambda payload=b"delta", round=1: describe(payload, "f", round=round)


def test_it_is_there_after_a_restart_until_it_is_settled(outbox, tmp_path, describe_one):
    first, second = (outbox.add(describe_one(), b"delta"), outbox.add(describe_one(round=2), b"delta"))
    again = Outbox(tmp_path / "box.sqlite", tmp_path)
    assert again.pending() == [first, second] and again.pending(limit=1) == [first]
    assert again.payload(first.transfer).read_bytes() == b"delta"
    again.commit(first.transfer)
    again.reject(second.transfer, "size", "too large")
    assert again.pending() == [] and again.find(first.transfer) == (first, "committed")
    assert not again.payload(first.transfer).exists()
    again.reject(first.transfer, "late", "a settled one stays as it is")
    assert again.find(first.transfer) == (first, "committed")


def test_sequence_numbers_only_grow(outbox, tmp_path, describe_one, monkeypatch):
    numbers = [outbox.add(describe_one(), b"delta").sequence for _ in range(3)]
    monkeypatch.setattr("time.time_ns", lambda: 0)  # the clock went back
    numbers.append(Outbox(tmp_path / "box.sqlite", tmp_path).add(describe_one(), b"delta").sequence)
    assert numbers == sorted(set(numbers))


def test_a_device_that_lost_its_state_goes_on_above_the_old_numbers(outbox, tmp_path, describe_one):
    before = outbox.add(describe_one(), b"delta").sequence
    assert Outbox(tmp_path / "new.sqlite", tmp_path / "new").add(describe_one(), b"delta").sequence > before


def test_the_callers_changes_share_the_transaction(tmp_path, describe_one):
    database = sqlite3.connect(tmp_path / "agent.sqlite")
    database.execute("CREATE TABLE residual (x)")
    outbox = Outbox(database, tmp_path)
    manifest = outbox.add(describe_one(), b"delta")
    with pytest.raises(RuntimeError), outbox.transaction():
        outbox.commit(manifest.transfer)
        database.execute("INSERT INTO residual VALUES (1)")
        raise RuntimeError
    assert outbox.pending() == [manifest] and outbox.payload(manifest.transfer).exists()
    with outbox.transaction():
        outbox.commit(manifest.transfer)
        database.execute("INSERT INTO residual VALUES (1)")
    other = sqlite3.connect(tmp_path / "agent.sqlite")
    assert other.execute("SELECT count(*) FROM residual").fetchone() == (1,)
    assert other.execute("SELECT state FROM outbox_update").fetchone() == ("committed",)


def test_a_file_of_the_caller_is_neither_moved_nor_deleted(outbox, tmp_path, describe_one):
    file = tmp_path / "delta.bin"
    file.write_bytes(b"delta")
    manifest = outbox.add(describe_one(), file)
    assert outbox.payload(manifest.transfer) == file
    outbox.commit(manifest.transfer)
    assert file.exists()


def test_the_folder_may_move(outbox, tmp_path, describe_one):
    file = tmp_path / "work" / "delta.bin"
    file.parent.mkdir()
    file.write_bytes(b"delta")
    ours, theirs = outbox.add(describe_one(), b"delta"), outbox.add(describe_one(round=2), file)
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    again = Outbox(moved / "box.sqlite", moved)
    assert [again.payload(one.transfer).read_bytes() for one in (ours, theirs)] == [b"delta", b"delta"]
    outside = tmp_path / "delta.bin"
    outside.parent.mkdir()
    outside.write_bytes(b"delta")
    assert again.payload(again.add(describe_one(round=3), outside).transfer) == outside


def test_what_a_crash_left_is_cleared(outbox, tmp_path, describe_one):
    manifest = outbox.add(describe_one(), b"delta")
    (tmp_path / "outbox" / "orphan").write_bytes(b"x")
    Outbox(tmp_path / "box.sqlite", tmp_path)
    assert [file.name for file in (tmp_path / "outbox").iterdir()] == [manifest.transfer]


def test_what_does_not_fit_its_manifest_is_refused(outbox, tmp_path, describe_one):
    with pytest.raises(BrokerError, match="has 3 bytes, its manifest says 5"):
        outbox.add(describe_one(), b"abc")
    manifest = describe_one()
    outbox.add(manifest, b"delta")
    with pytest.raises(BrokerError, match="already in the outbox"):
        outbox.add(manifest, b"delta")
    with pytest.raises(BrokerError, match="is not in the outbox"):
        outbox.payload("nothing")
