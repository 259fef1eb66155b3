"""Ed25519 signatures over text bodies, each bound to a domain.

    signature = Ed25519(domain + NUL + body)

The envelope is JSON with the body as text and key and signature as hex, so `mosquitto_sub -v` shows
it. The domain keeps a signature made for one purpose from being used for another. Keys travel as 64
characters of hex.
Source: RFC 8032, by way of `cryptography`.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_broker import messages
from edge_broker.errors import BadFile, BadMessage, WrongKey

OFFER = "edge/1/offer"  # the domain of manifests


class Signed(msgspec.Struct, frozen=True):
    """A body with the public key and the signature that vouch for it, both hex."""

    body: str
    key: str
    signature: str


def load_or_create_key(path: Path) -> Ed25519PrivateKey:
    """The private key in this file; a new one is written (mode 0600) if there is no file.

    Two processes that create it at once end up with the same key.

    Raises:
        BadFile: the file holds something else, or cannot be read or written.
    """
    try:
        if not path.exists():
            _create(path)
        raw = bytes.fromhex(path.read_text("ascii").strip())
        return Ed25519PrivateKey.from_private_bytes(raw)
    except (OSError, ValueError) as error:
        raise BadFile(
            f"cannot use {path} as a signing key: {error}; it has to be this user's, and 64 characters of hex; put "
            f"a backup of {path.parent} back, or start anew with another folder, as another device or node"
        ) from error


def public_key(key: Ed25519PrivateKey) -> str:
    """The public half as 64 characters of hex: what the other side registers."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, domain: str, body: bytes) -> bytes:
    """The envelope of a UTF-8 body, signed for one domain."""
    signature = key.sign(_bound(domain, body)).hex()
    return messages.encode(Signed(body=body.decode(), key=public_key(key), signature=signature))


def open(signed_bytes: bytes, domain: str, expected_key: str | None) -> tuple[bytes, str]:
    """Verify an encoded envelope.

    Args:
        signed_bytes: an envelope from `sign`.
        domain: the domain that the envelope must be signed for.
        expected_key: the only key accepted, as hex; None: any, and the caller judges the key.

    Returns:
        The body, and the public key (hex) that signed it.

    Raises:
        BadMessage: the envelope is malformed, or the signature does not verify.
        WrongKey: the envelope is signed by another key.
    """
    signed = peek(signed_bytes)
    if expected_key is not None and signed.key != expected_key:
        raise WrongKey(f"signed by key {signed.key[:16]}…, expected {expected_key[:16]}…")
    body = signed.body.encode()
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.key))
        key.verify(bytes.fromhex(signed.signature), _bound(domain, body))
    except (InvalidSignature, ValueError):
        raise BadMessage(f"the signature by key {signed.key[:16]}… does not verify for {domain}") from None
    return body, signed.key


def peek(signed_bytes: bytes) -> Signed:
    """The envelope without any verification: only to find out which key to expect."""
    return messages.decode(signed_bytes, Signed, "signed message")


def _bound(domain: str, body: bytes) -> bytes:
    return domain.encode() + b"\0" + body


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # a temporary file has mode 0600
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.") as draft:
        draft.write(Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n")
        draft.flush()
        os.fsync(draft.fileno())
        # unlike a rename, a link never replaces a key that another process made first
        with suppress(FileExistsError):
            os.link(draft.name, path)
