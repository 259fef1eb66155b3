"""Files that survive a power cut and a move of their folder."""

import os
from pathlib import Path


def put(fresh: Path, path: Path) -> None:
    """Give a written file or folder its name; its bytes reach the disk before its name does.

    Raises:
        OSError: a folder that is not empty has the name already.
    """
    for part in (*fresh.rglob("*"), fresh):
        sync(part)
    fresh.replace(path)
    sync(path.parent)


def movable(path: Path, folder: Path) -> str:
    """The path as a database in the folder stores it: `folder / path` outlives a move."""
    path, folder = path.absolute(), folder.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
