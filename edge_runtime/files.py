"""Files that survive a power cut."""

import os
from pathlib import Path


def put(fresh: Path, path: Path) -> None:
    """Give a written file its name: its bytes are on the disk before the name is, and the name when this returns."""
    _sync(fresh)
    fresh.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
