"""Lines on standard output, each flushed: another program may read them as they come."""

import sys
from typing import Any

import msgspec


def say(line: str) -> None:
    """Print one line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    say(msgspec.json.encode(value).decode())
