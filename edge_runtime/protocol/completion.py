"""How a public prompt goes on, as text: models of any two tokenizers can read it."""

from collections.abc import Sequence

import msgspec

from edge_runtime.errors import InputError


class Completion(msgspec.Struct, frozen=True, array_like=True):
    """A completion of one public prompt."""

    prompt: int  # the prompt's number in the fleet's file
    text: str
    confidence: float  # 0 to 1


def encode(completions: Sequence[Completion]) -> bytes:
    """Completions as JSON; no bytes for none."""
    return msgspec.json.encode(completions) if completions else b""


def decode(payload: bytes) -> list[Completion]:
    """The completions that `encode` was given.

    Raises:
        InputError: the payload is no list of number, text and confidence.
    """
    if not payload:
        return []
    try:
        return msgspec.json.decode(payload, type=list[Completion])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the payload's completions cannot be read: {error}") from error
