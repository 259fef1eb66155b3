"""An update from a device to the node: offer, grant, chunks, receipt."""

import json
import random

import pytest
from edge_broker import chunks, messages, signing, topics
from edge_broker.transfer import Committed, Rejected, receive

CHUNK = 64 * 1024


def payload_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 << 20])
def test_an_update_of_any_size_arrives_and_counts(size, device, node, drive):
    d, n = device(), node()
    manifest = d.add(payload_of(size))
    drive(lambda: d.results, d, n)
    assert d.results == [Committed(manifest=manifest)]
    assert n.complete[0].payload.read_bytes() == payload_of(size)
    assert n.chunks == manifest.chunks == -(-size // CHUNK)
    assert [update.manifest for update in n.journal.committed(1)] == [manifest]


def test_several_updates_go_one_after_the_other(device, node, drive):
    d, n = device(), node()
    manifests = [d.add(payload_of(100), round=round) for round in (1, 2, 3)]
    drive(lambda: len(d.results) == 3, d, n)
    assert [result.manifest for result in d.results] == manifests
    assert d.outbox.pending() == []


@pytest.mark.parametrize("under_way", [768, 8])  # 8 chunks are two updates: the third device has to wait
def test_devices_share_one_node(under_way, device, node, drive, monkeypatch):
    monkeypatch.setattr(receive, "UNDER_WAY", under_way)
    monkeypatch.setattr(receive, "_PAUSE_S", 0.2)
    n, parties = node(), [device(f"d{i}") for i in range(3)]
    for party in parties:
        party.add(payload_of(200_000))
    drive(lambda: all(party.results for party in parties), n, *parties)
    assert {update.manifest.device for update in n.journal.committed(1)} == {party.name for party in parties}


def test_a_payload_in_a_file_is_sent_from_where_it_is(device, node, drive, tmp_path, describe):
    d, n = device(), node()
    file = tmp_path / "delta.bin"
    file.write_bytes(payload_of(200_000))
    d.outbox.add(describe(file, d.fleet), file)
    drive(lambda: d.results, d, n)
    assert n.complete[0].payload.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("broken", ["gone", "cut"])
def test_a_payload_that_cannot_be_read_ends_the_update(broken, device, node, drive):
    d, n = device(), node()
    manifest = d.add(payload_of(200_000))
    payload = d.outbox.payload(manifest.transfer)
    payload.unlink() if broken == "gone" else payload.write_bytes(b"short")
    drive(lambda: d.results, d, n)
    assert (d.results[0].code, d.results[0].final) == ("payload", True) and str(payload) in d.results[
        0
    ].reason
    assert d.outbox.pending() == []


def test_an_empty_update_is_refused_before_anything_is_sent(device):
    with pytest.raises(Exception, match="is empty"):
        device().add(b"")


def test_an_offer_repeated_after_the_commit_gets_the_same_receipt_and_counts_once(
    device, node, drive, await_message
):
    d, n = device(), node()
    manifest = d.add(payload_of(1000))
    drive(lambda: d.results, d, n)
    d.session.publish(topics.offer(d.fleet, d.name), signed(d, manifest))
    drive(lambda: d.session._queue.qsize(), n)
    receipt = messages.decode_inbox(await_message(d.session).payload)
    assert receipt == messages.Receipt(transfer=manifest.transfer, round=1)
    assert len(n.complete) == 1 and len(n.journal.committed(1)) == 1


def test_duplicated_and_reordered_chunks_make_the_same_file(device, node, drive, await_message):
    d, n = device(), node()
    payload = payload_of(10 * 1024 + 1)
    manifest = d.add(payload, chunk_bytes=1024)
    offer_by_hand(d, manifest, n, drive, await_message)
    order = [*range(manifest.chunks), *range(manifest.chunks)]
    random.Random(0).shuffle(order)
    for index in order:
        chunk = chunks.pack(index, payload[index * 1024 : (index + 1) * 1024])
        d.session.publish(topics.up(d.fleet, "n", d.name, manifest.transfer), chunk)
    drive(lambda: n.chunks == len(order), n)
    assert [done.payload.read_bytes() for done in n.complete] == [payload]


def test_a_chunk_that_does_not_fit_changes_nothing(device, node, drive, await_message):
    d, n = device(), node()
    payload = payload_of(3000)
    manifest = d.add(payload, chunk_bytes=1024)
    offer_by_hand(d, manifest, n, drive, await_message)
    topic = topics.up(d.fleet, "n", d.name, manifest.transfer)
    for bad in [b"", b"\0\0\0\0", chunks.pack(0, b"short"), chunks.pack(9, bytes(1024))]:
        d.session.publish(topic, bad)
    drive(lambda: n.chunks == 4, n)
    assert n.journal.missing(manifest, 9) == [0, 1, 2]


def test_the_receipt_comes_only_after_the_owners_check(device, node, drive):
    d, n = device(), node()
    n.hold = True
    manifest = d.add(payload_of(1000))
    drive(lambda: n.complete, d, n)
    assert n.journal.committed(1) == [] and d.outbox.pending() == [manifest]
    n.receiver.reject(manifest.transfer, "a value is not finite")
    drive(lambda: d.results, d, n)
    assert d.results[0] == Rejected(
        manifest=manifest, code="content", reason="a value is not finite", final=True
    )
    assert d.outbox.pending() == [] and not n.complete[0].payload.exists()


def test_a_reason_longer_than_a_message_is_cut_and_the_node_goes_on(device, node, drive):
    d, n = device(), node()
    n.hold = True
    manifest = d.add(payload_of(1000))
    drive(lambda: n.complete, d, n)
    n.receiver.reject(manifest.transfer, "x" * (4 << 20))
    drive(lambda: d.results, d, n)
    assert d.results[0].reason == "x" * 1000 and d.results[0].final


def test_a_transfer_still_open_when_its_round_closes_is_ended_with_the_reason(device, node, drive):
    d, n = device(), node()
    manifest = d.add(payload_of(3 << 20), chunk_bytes=4096)
    drive(lambda: n.chunks > 10, d, n)
    for late in n.journal.open_transfers():
        n.receiver.reject(late.transfer, "round 1 is closed", code="late")
    drive(lambda: d.results, d, n)
    assert d.results == [Rejected(manifest=manifest, code="late", reason="round 1 is closed", final=True)]
    assert not n.journal.payload(manifest.transfer).exists() and n.complete == []


def test_what_the_owner_writes_is_committed_with_the_update_or_not_at_all(device, node, drive):
    d, n = device(), node()
    n.hold = True
    d.uploader._on_settled = lambda result: d.outbox._database.execute("CREATE TABLE residual (x)")
    manifest = d.add(payload_of(1000))
    drive(lambda: n.complete, d, n)

    def fails():
        n.journal._database.execute("CREATE TABLE merge (x)")
        raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError):
        n.receiver.commit(manifest.transfer, fails)
    assert n.journal.committed(1) == []
    assert n.receiver.commit(manifest.transfer, lambda: n.journal._database.execute("CREATE TABLE merge (x)"))
    assert not n.receiver.commit(manifest.transfer)  # a second time it does not count
    drive(lambda: d.results, d, n)
    assert d.outbox._database.execute("SELECT count(*) FROM residual").fetchone() == (0,)


def test_a_failing_owner_of_the_outbox_leaves_the_update_pending(device, node, drive, impatient):
    d, n = device(), node()
    calls = []

    def fails_once(result):
        calls.append(result)
        if len(calls) == 1:
            raise RuntimeError("stopped in the middle")

    d.uploader._on_settled = fails_once
    manifest = d.add(payload_of(1000))
    with pytest.raises(RuntimeError):
        drive(lambda: d.results, d, n)
    assert d.outbox.pending() == [manifest]
    drive(lambda: d.results, d, n)  # it asks again and gets the stored receipt
    assert d.outbox.pending() == [] and len(n.journal.committed(1)) == 1


# --- refusals, each with its reason


def test_the_check_can_refuse_a_manifest_before_any_chunk(device, node, drive):
    d, n = device(), node(check=lambda manifest: f"round {manifest.round} is closed")
    manifest = d.add(payload_of(1000))
    drive(lambda: d.results, d, n)
    assert d.results == [Rejected(manifest=manifest, code="check", reason="round 1 is closed", final=True)]
    assert n.chunks == 0 and n.journal.find(manifest.transfer).reason == "round 1 is closed"


def test_a_device_counts_once_a_round(device, node, drive):
    d, n = device(), node()
    d.add(payload_of(1000))
    d.add(payload_of(1001))
    drive(lambda: len(d.results) == 2, d, n)
    assert (d.results[1].code, d.results[1].reason) == ("duplicate", "device d already counts in round 1")
    assert len(n.journal.committed(1)) == 1


def test_two_transfers_of_one_round_that_were_both_complete_count_once(device, node, drive, await_message):
    d, n = device(), node()
    n.hold = True
    both = [d.add(payload_of(size)) for size in (1000, 1001)]
    for manifest in both:
        offer_by_hand(d, manifest, n, drive, await_message)
        d.session.publish(
            topics.up(d.fleet, "n", d.name, manifest.transfer),
            chunks.pack(0, payload_of(manifest.size)),
        )
    drive(lambda: len(n.complete) == 2, n)
    assert [n.receiver.commit(manifest.transfer) for manifest in both] == [True, False]
    assert n.journal.find(both[1].transfer).code == "duplicate"


def test_an_unknown_device_and_a_wrong_key_are_refused_but_not_for_good(device, node, drive):
    stranger, n = device("stranger", enrol=False), node()
    manifest = stranger.add(payload_of(1000))
    drive(lambda: stranger.results, stranger, n)
    assert stranger.results[0].reason == "device stranger is not enrolled with this node"
    assert not stranger.results[0].final and stranger.outbox.pending() == [manifest]
    other = device("other")
    other.key = other.uploader._key = stranger.key
    other.add(payload_of(1000))
    drive(lambda: other.results, other, n)
    assert other.results[0].reason.startswith("signed by key") and not other.results[0].final


def test_a_changed_manifest_does_not_verify(device, node, drive, await_message):
    d, n = device(), node()
    manifest = d.add(payload_of(1000))
    envelope = json.loads(signed(d, manifest))
    envelope["body"] = envelope["body"].replace('"samples":10', '"samples":99')
    reject = answer_to(json.dumps(envelope).encode(), d, n, drive, await_message)
    assert reject.code == "signature" and "does not verify" in reject.reason
    assert n.journal.find(manifest.transfer) is None


def test_a_signature_for_another_purpose_does_not_verify(device, node, drive, await_message):
    d, n = device(), node()
    body = messages.encode(d.add(payload_of(1000)))
    reject = answer_to(signing.sign(d.key, "edge/1/report", body), d, n, drive, await_message)
    assert "does not verify for edge/1/offer" in reject.reason


def test_other_bytes_than_offered_are_refused(device, node, drive):
    d, n = device(), node()
    manifest = d.add(payload_of(1000))
    d.outbox.payload(manifest.transfer).write_bytes(payload_of(1000)[::-1])
    drive(lambda: d.results, d, n)
    assert d.results[0].code == "digest" and d.results[0].final
    assert n.complete == [] and n.journal.find(manifest.transfer).state == "rejected"


def test_a_replayed_sequence_is_refused(device, node, drive, describe, await_message):
    d, n = device(), node()
    first = d.add(payload_of(1000))
    drive(lambda: d.results, d, n)
    replay = rewritten(describe(payload_of(2000), d.fleet, round=2), sequence=first.sequence)
    reject = answer_to(signed(d, replay), d, n, drive, await_message)
    assert (reject.code, reject.final) == ("replay", True) and str(first.sequence) in reject.reason
    accepted = rewritten(replay, sequence=first.sequence + 1)  # the twin: one higher and it is granted
    assert isinstance(answer_to(signed(d, accepted), d, n, drive, await_message), messages.Grant)


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"fleet": "elsewhere"}, "fleet", "is for fleet elsewhere"),
        ({"size": (1 << 30) + 1, "chunks": 16385}, "size", "this node takes 1073741824"),
        ({"chunks": 7}, "size", "do not add up"),
        ({"chunk_bytes": 1, "size": 70_000, "chunks": 70_000}, "size", "more than 65536 chunks"),
    ],
)
def test_a_manifest_that_cannot_be_taken(changes, code, reason, device, node, drive, describe, await_message):
    d, n = device(), node()
    manifest = rewritten(describe(payload_of(1000), d.fleet), sequence=1, **changes)
    reject = answer_to(signed(d, manifest), d, n, drive, await_message)
    assert (reject.code, reject.final) == (code, True) and reason in reject.reason
    assert not n.journal.payload(manifest.transfer).exists()


def test_another_device_cannot_speak_for_this_one(device, node, drive, await_message):
    d, thief, n = device("d"), device("thief"), node()
    manifest = d.add(payload_of(1000))
    reject = answer_to(signed(d, manifest), thief, n, drive, await_message)
    assert "expected" in reject.reason  # signed by another key than the thief's
    reject = answer_to(signed(thief, manifest), thief, n, drive, await_message)
    assert reject.reason == "the manifest is of device d, offered by thief"


# --- helpers


def signed(party, manifest) -> bytes:
    return signing.sign(party.key, signing.OFFER, messages.encode(manifest))


def rewritten(manifest, **changes):
    return messages.decode(json.dumps(json.loads(messages.encode(manifest)) | changes), messages.Manifest)


def answer_to(offer, party, n, drive, await_message):
    """What the node says to an offer published by hand (the uploader is not driven)."""
    party.session.publish(topics.offer(party.fleet, party.name), offer)
    answers = []
    drive(lambda: answers or answers.extend(inbox(party.session)), n)
    return answers[0]


def inbox(session):
    found = session.receive(0.001)
    return [messages.decode_inbox(found.payload)] if hasattr(found, "payload") else []


def offer_by_hand(party, manifest, n, drive, await_message) -> None:
    assert isinstance(answer_to(signed(party, manifest), party, n, drive, await_message), messages.Grant)
