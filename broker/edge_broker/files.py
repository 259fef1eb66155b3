"""Files that survive a power cut."""

import os
from pathlib import Path


def put(fresh: Path, path: Path) -> None:
    """Give a written file its name: its bytes are on the disk before the name is, and the name when this returns."""
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
