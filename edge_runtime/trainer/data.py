"""A device's rows, in .jsonl files: one JSON object a line, in one of four forms.

    {"prompt", "completion"}    {"messages": [...]}    {"text"}    {"text", "label"}

Rows stay on disk. Every function but `read_rows` goes through a file a line at a time, so memory
does not grow with the rows. This file imports no torch: the agent checks its data before it
connects to anything.
"""

import json
import random
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from edge_broker import files

from edge_runtime.errors import InputError

FORMS: list[set[str]] = [{"prompt", "completion"}, {"messages"}, {"text"}, {"text", "label"}]
# Keys by which other trainers write more into a prompt, which is not done here; empty ones do no harm.
# Their names may mean something else in rows of a text.
PROMPTED = ("tools", "functions", "documents", "system", "images", "chat_template", "chat_template_kwargs")
MOST_BYTES = 16 << 20  # of a line
MOST_HELD_OUT = 200

Row = dict[str, Any]


def stream(path: Path, numbers: Collection[int] | None = None) -> Iterator[Row]:
    """The rows of a .jsonl file, in order, each checked as it is read.

    Args:
        numbers: of the rows to read, counted from 0; None: all.

    Raises:
        InputError: the file is missing or empty, or a row, named by its line, has none of the
            forms above.
    """
    for count, (number, line) in enumerate(_lines(path)):
        if numbers is None or count in numbers:
            yield _row(line, f"{path}, line {number}")


def read_rows(path: Path) -> list[Row]:
    """All rows of a small .jsonl file; raises as `stream` does."""
    return list(stream(path))


def count_rows(path: Path) -> int:
    """How many rows a .jsonl file has, without a look at their form; raises as `stream` does."""
    return sum(1 for _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its number from 1."""
    empty = True
    try:
        with path.open("rb") as file:
            # not splitlines: a JSON text may hold U+2028 and the like
            for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), 1):
                if len(line) > MOST_BYTES:
                    raise InputError(
                        f"{path}, line {number}: longer than {MOST_BYTES >> 20} MiB, the most that a row may "
                        "have; write one row a line"
                    )
                # any line may have a mark: files that have one may have been joined
                line = line if line[:2] == b'{"' else files.utf_8(line)
                if line.strip():
                    empty = False
                    yield number, line
    except OSError as error:
        raise InputError(
            f"cannot read the data file {path}: {error.strerror}; give the path of a .jsonl file"
        ) from error
    except files.NotUtf8 as error:
        raise InputError(f"the data file {path} {error}") from error
    if empty:
        raise InputError(
            f"the data file {path} has no rows: write one JSON object a line, with prompt and completion"
        )


def _row(line: bytes, where: str) -> Row:
    row = _parsed(line, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} seen, a JSON object is needed")
    keys = row.keys() & set().union(*FORMS)
    if keys not in FORMS:
        seen = ", ".join(words(row)) or "nothing"
        raise InputError(
            f"{where}: has {seen}; needed: prompt and completion, or messages, or text, or text and label"
        )
    for key in PROMPTED if keys & {"messages", "prompt"} else ():
        if row.get(key):
            raise InputError(
                f"{where}: has {key}, which is not written into the prompt here, so another row would be learned: "
                "write it into the prompt or a system message, and remove the key"
            )
    for key in keys - {"messages"}:
        if not isinstance(row[key], str) or (key != "prompt" and not row[key].strip()):
            raise InputError(f"{where}: `{key}` has to be text that is not empty, seen {_kind(row[key])}")
    if "messages" in keys:
        _check_messages(row["messages"], where)
    return row


def _parsed(line: bytes, where: str) -> Any:
    """The JSON value of a line. What the fast reader refuses, json may read, or say what is wrong."""
    try:
        return msgspec.json.decode(line)
    except (ValueError, RecursionError):
        pass
    try:
        value = json.loads(line.decode().rstrip())
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: holds half of a character (a lone surrogate), which is no text"
        ) from error
    except json.JSONDecodeError as error:
        place = f"{error.msg}, character {error.pos + 1}"
        raise InputError(f"{where}: not a JSON object on one line ({place})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object ({error})") from error
    return value


def _kind(value: Any) -> str:
    """The kind of a JSON value, for a message; the value is private."""
    if isinstance(value, str):
        return "blank text" if value else '""'
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def words(names: Iterable[str]) -> list[str]:
    """Names of fields or roles, for a message; other than plain words may be private text."""
    return sorted({name if name.isidentifier() and len(name) <= 20 else "(no plain word)" for name in names})


def _check_messages(messages: Any, where: str) -> None:
    form = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not form:
        raise InputError(
            f"{where}: `messages` has to be a list of objects with a role and a content, both text"
        )
    if not any(turn["role"] == "assistant" for turn in messages):
        raise InputError(f"{where}: no message has the role assistant, so there is nothing to learn")
    if any(turn.get("weight") not in (None, 1) or turn.get("train") is False for turn in messages):
        raise InputError(
            f"{where}: a message has a weight other than 1, or train false, but all of the assistant's turns are "
            "learned alike: remove the row, or the key if the turn may be learned"
        )
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's, but it has to answer something")


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as a .jsonl file; returns its path."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def hold_out(path: Path, train: Path, held_out: Path, seed: int) -> bool:
    """Copy a file's rows: a drawn tenth, at most MOST_HELD_OUT, to `held_out`, the others to `train`.

    Returns:
        Whether there are enough rows for that; False: nothing is written.
    """
    count = count_rows(path)
    order = islice(permuted(count, random.Random(seed)), min(count // 10, MOST_HELD_OUT))
    places = {number: place for place, number in enumerate(order)}
    if not places:
        return False
    drawn: dict[int, bytes] = {}
    with train.open("wb") as others:
        for number, (_, line) in enumerate(_lines(path)):
            line = line.rstrip(b"\r\n") + b"\n"
            if number in places:
                drawn[places[number]] = line
            else:
                others.write(line)
    held_out.write_bytes(b"".join(drawn[place] for place in sorted(drawn)))
    return True


def permuted(count: int, draw: random.Random) -> Iterator[int]:
    """The numbers below `count` in the order of draw.sample(range(count), count), drawn one by one.

    Memory grows with the numbers that are taken, not with `count`.
    """
    moved: dict[int, int] = {}  # numbers that took the place of drawn ones
    for last in range(count - 1, -1, -1):
        place = draw.randrange(last + 1)
        yield moved.get(place, place)
        moved[place] = moved.pop(last, last)


def labels_of(rows: Iterable[Row]) -> set[str]:
    """The distinct labels of rows."""
    return {row["label"] for row in rows if "label" in row}
