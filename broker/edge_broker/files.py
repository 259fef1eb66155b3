"""Files that survive a power cut and a move of their folder; text that people wrote on any system."""

import codecs
import os
from pathlib import Path


class NotUtf8(ValueError):
    """Text in another encoding; the message continues a sentence about the file."""


def utf_8(content: bytes) -> bytes:
    """The beginning of a text file, without the byte order mark that Windows' editors write.

    Raises:
        NotUtf8: the text is in UTF-16 or UTF-32, with or without a mark.
    """
    # NUL is no text: at the beginning it is half of a character of UTF-16
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise NotUtf8("is UTF-16 text (Windows calls it Unicode), but has to be UTF-8: save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def put(fresh: Path, path: Path) -> None:
    """Give a written file or folder its name; its bytes reach the disk before its name does.

    Raises:
        OSError: a folder that is not empty has the name already.
    """
    settle(fresh)
    fresh.replace(path)
    sync(path.parent)


def settle(path: Path) -> None:
    """Make a file's bytes durable, or those of all files in a folder."""
    for part in (*path.rglob("*"), path):
        sync(part)


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
