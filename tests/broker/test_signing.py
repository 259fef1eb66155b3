import json
import stat
import threading

import pytest
from edge_broker import signing
from edge_broker.errors import BadFile, BadMessage

BODY = '{"round":3,"name":"Grüße"}'.encode()


@pytest.fixture
def key(tmp_path):
    return signing.load_or_create_key(tmp_path / "key")


def test_what_was_signed_opens_and_stays_readable(key):
    envelope = signing.sign(key, "a", BODY)
    assert signing.open(envelope, "a", signing.public_key(key)) == (BODY, signing.public_key(key))
    assert signing.open(envelope, "a", None)[1] == signing.public_key(key)
    assert json.loads(envelope)["body"] == BODY.decode()


@pytest.mark.parametrize("change", ["body", "key", "signature", "domain"])
def test_any_change_is_found(key, tmp_path, change):
    envelope = json.loads(signing.sign(key, "a", BODY))
    other = json.loads(signing.sign(signing.load_or_create_key(tmp_path / "other"), "a", BODY + b" "))
    if change != "domain":
        envelope[change] = other[change]
    with pytest.raises(BadMessage, match="does not verify"):
        signing.open(json.dumps(envelope).encode(), "b" if change == "domain" else "a", None)


def test_another_key_than_expected_is_named(key, tmp_path):
    expected = signing.public_key(signing.load_or_create_key(tmp_path / "other"))
    with pytest.raises(
        BadMessage, match=f"signed by key {signing.public_key(key)[:16]}…, expected {expected[:16]}…"
    ):
        signing.open(signing.sign(key, "a", BODY), "a", expected)


NESTED = b'{"unknown":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "bad", [b"", b"{}", b'{"body":"","key":"zz","signature":""}', b'{"body":1}', b"\xff", NESTED]
)
def test_what_is_no_envelope_is_a_bad_message(bad):
    with pytest.raises(BadMessage):
        signing.open(bad, "a", None)


def test_a_key_is_kept_for_its_owner_only(key, tmp_path):
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert signing.public_key(signing.load_or_create_key(tmp_path / "key")) == signing.public_key(key)
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_two_that_create_it_at_once_get_the_same_key(tmp_path):
    path, found, start = tmp_path / "key", [], threading.Barrier(4)

    def create():
        start.wait()
        found.append(signing.public_key(signing.load_or_create_key(path)))

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 4 and len(set(found)) == 1


def test_a_file_that_is_no_key_is_refused(tmp_path):
    (tmp_path / "key").write_text("hello")
    with pytest.raises(
        BadFile, match=r"cannot use .*key as a signing key: .*; put a backup of .* back, or start anew"
    ):
        signing.load_or_create_key(tmp_path / "key")
