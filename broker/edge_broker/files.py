"""Files that survive a power cut, and a move of the folder they lie in."""

import os
from pathlib import Path


def put(fresh: Path, path: Path) -> None:
    """Give a written file or folder its name: its bytes are on the disk before the name is, and the name when this returns.

    A folder takes no other's place: OSError where there is one with files in it.
    """
    for part in (*fresh.rglob("*"), fresh):
        sync(part)
    fresh.replace(path)
    sync(path.parent)


def told(path: Path, folder: Path) -> str:
    """A path as a database in the folder keeps it, so that `folder / told` finds it wherever the folder is by then."""
    path, folder = path.absolute(), folder.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
