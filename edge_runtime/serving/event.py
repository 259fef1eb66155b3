"""What a server process prints with `--json`, a line each; an agent reads the lines."""

from typing import Literal

import msgspec


class ServerEvent(msgspec.Struct, frozen=True):
    """One line of output."""

    # ready for requests; new requests take another version; a version cannot be used and the one before stays
    phase: Literal["listening", "version", "refused"]
    version: int  # that new requests take now
    text: str  # for people
