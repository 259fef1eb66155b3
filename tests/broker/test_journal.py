import random

import pytest
from edge_broker import store
from edge_broker.chunks import size_of
from edge_broker.errors import BadMessage
from edge_broker.journal import Journal

PAYLOAD = random.Random(0).randbytes(40 * 100 + 7)


@pytest.fixture
def journal(tmp_path):
    return Journal(store.connect(tmp_path / "node.sqlite"), tmp_path)


@pytest.fixture
def manifest(describe):
    return describe(PAYLOAD, "f", chunk_bytes=100)


def write(journal, manifest, indices):
    return [journal.write(manifest, i, PAYLOAD[i * 100 : i * 100 + size_of(manifest, i)]) for i in indices]


def test_a_transfer_is_collected_verified_counted_and_released(journal, manifest):
    journal.open(manifest)
    assert journal.find(manifest.transfer).state == "open" and journal.open_transfers() == [manifest]
    order = list(range(41))
    random.Random(1).shuffle(order)
    assert all(write(journal, manifest, order)) and not any(write(journal, manifest, [3, 3]))
    assert journal.missing(manifest, 99) == []
    assert journal.verify(manifest).read_bytes() == PAYLOAD
    assert journal.commit(manifest.transfer) and not journal.commit(manifest.transfer)
    assert journal.counted("d", 1) and journal.open_transfers() == []
    (update,) = journal.committed(1)
    assert update.manifest == manifest and update.payload.read_bytes() == PAYLOAD
    journal.release(1)
    assert not update.payload.exists() and journal.find(manifest.transfer).state == "committed"


def test_a_restart_keeps_what_was_flushed_and_never_more(journal, manifest, tmp_path):
    journal.open(manifest)
    write(journal, manifest, range(20))
    again = Journal(store.connect(tmp_path / "node.sqlite"), tmp_path)
    assert again.missing(manifest, 99) == list(range(16, 41))
    write(again, manifest, range(16, 41))
    assert again.verify(manifest).read_bytes() == PAYLOAD


def test_a_lost_file_is_collected_anew(journal, manifest, tmp_path):
    journal.open(manifest)
    write(journal, manifest, range(41))
    journal.verify(manifest)
    journal.payload(manifest.transfer).unlink()
    for _ in range(2):  # the second process finds the new file of the first
        assert len(Journal(store.connect(tmp_path / "node.sqlite"), tmp_path).missing(manifest, 99)) == 41


def test_other_bytes_do_not_verify(journal, manifest):
    journal.open(manifest)
    write(journal, manifest, range(41))
    with journal.payload(manifest.transfer).open("r+b") as file:
        file.write(bytes([PAYLOAD[0] ^ 1]))
    with pytest.raises(BadMessage, match="the manifest says"):
        journal.verify(manifest)


@pytest.mark.parametrize(("index", "size"), [(0, 99), (0, 101), (40, 100), (41, 7), (2**31, 100)])
def test_a_chunk_that_does_not_fit_is_refused(journal, manifest, index, size):
    journal.open(manifest)
    with pytest.raises(BadMessage, match="does not fit"):
        journal.write(manifest, index, bytes(size))


def test_the_database_itself_lets_a_device_count_once_a_round(journal, manifest, describe):
    second = describe(b"other", "f")
    for one in (manifest, second):
        journal.open(one)
    assert journal.commit(manifest.transfer) and not journal.commit(second.transfer)
    with pytest.raises(Exception, match="UNIQUE"):
        journal._database.execute("UPDATE journal_transfer SET state = 'committed'")


def test_the_sequence_is_the_highest_seen_and_rejected_ones_count_too(journal, describe):
    import msgspec

    assert journal.sequence("d") == 0
    journal.open(msgspec.structs.replace(describe(b"a", "f"), sequence=5))
    refused = msgspec.structs.replace(describe(b"b", "f"), sequence=7)
    journal.reject(refused, "check", "no")
    assert journal.sequence("d") == 7
    entry = journal.find(refused.transfer)
    assert (entry.state, entry.code, entry.reason) == ("rejected", "check", "no")
    journal.reject(refused, "other", "stays as it is")
    assert journal.find(refused.transfer) == entry
