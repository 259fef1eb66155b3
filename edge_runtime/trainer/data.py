"""Reads a device's rows and makes token sequences of them, with labels on what the model is to say.

    {"prompt", "completion"}    the completion and the end-of-text token are learned
    {"messages": [...]}         the assistant's turns are learned, in the model's chat template
    {"text"}                    every token is learned
    {"text", "label"}           the label's name, written after the text, is learned; or the label by a head of its own

Reading imports no torch: the agent checks its data before it connects to anything.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.errors import InputError

IGNORED = -100
FORMS: tuple[frozenset[str], ...] = (
    frozenset({"prompt", "completion"}),
    frozenset({"messages"}),
    frozenset({"text"}),
    frozenset({"text", "label"}),
)

Row = dict[str, Any]


class Example(NamedTuple):
    """Token ids, and for each the label: itself where it is learned, else IGNORED. At least one is learned, unless a head
    learns the text's label: then there are no labels of tokens, and answer is its number, IGNORED where the head lacks it."""

    ids: list[int]
    labels: list[int]
    answer: int | None = None


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl file.

    Raises:
        InputError: the file is missing or empty, or a row is not one of the forms above; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # not splitlines: a JSON text may hold U+2028 and the like
    except OSError as error:
        raise InputError(
            f"cannot read the data file {path}: {error.strerror}; give the path of a .jsonl file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"the data file {path} is not UTF-8 text (byte {error.start})") from error
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(
            f"the data file {path} has no rows: write one JSON object a line, with prompt and completion"
        )
    return rows


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} seen, a JSON object is needed")
    keys = frozenset(row) & frozenset().union(*FORMS)
    if keys not in FORMS:
        seen = ", ".join(_words(row)) or "nothing"
        raise InputError(
            f"{where}: has {seen}; needed: prompt and completion, or messages, or text, or text and label"
        )
    for key in keys - {"messages"}:
        if not isinstance(row[key], str) or (key != "prompt" and not row[key].strip()):
            raise InputError(f"{where}: `{key}` has to be text that is not empty, seen {_kind(row[key])}")
    if "messages" in keys:
        _check_messages(row["messages"], where)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: holds half of a character (a lone surrogate), which is no text"
        ) from error
    return row


def _kind(value: Any) -> str:
    """The kind of a JSON value, for a message; the value is private."""
    if isinstance(value, str):
        return "blank text" if value else '""'
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _words(names: Iterable[str]) -> list[str]:
    """Names of fields or roles, for a message; a name that is no plain word may be text of the row."""
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
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's, but it has to answer something")


def read_asked(path: Path) -> list[Row]:
    """Rows of a text, or of messages that the assistant has still to answer, as the fleet's node wrote them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def asked(row: Row, tokenizer: Any) -> list[int]:
    """Token ids of such a row, behind which the completion begins; raises InputError as tokenize does."""
    if "messages" in row:
        return _templated(row["messages"], tokenizer, add_generation_prompt=True)
    ids: list[int] = tokenizer(row["text"]).input_ids
    return ids


def answered(row: Row, completion: str) -> Row:
    """Such a row with its completion, to be learned."""
    if "messages" in row:
        return {"messages": [*row["messages"], {"role": "assistant", "content": completion}]}
    return {"prompt": row["text"], "completion": completion}


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows as a .jsonl file; returns its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows where the user named no held-out file: every tenth row, at most 200, after a seeded shuffle."""
    mixed = random.Random(seed).sample(rows, len(rows))
    held = min(len(rows) // 10, 200)
    return mixed[held:], mixed[:held]


def labels_of(rows: list[Row]) -> set[str]:
    """The labels that rows of text and label have."""
    return {row["label"] for row in rows if "label" in row}


def tokenize(
    rows: list[Row], tokenizer: Any, max_tokens: int, labels: Sequence[str] | None = None
) -> list[Example]:
    """Token sequences of at most max_tokens; a prompt loses its beginning, plain text and a head's text their end.

    labels: that a head tells apart; None: labels are learned as text.

    Raises:
        InputError: messages for a model without a chat template, or such as its template refuses.
    """
    numbers = None if labels is None else {label: number for number, label in enumerate(labels)}
    return [_example(row, tokenizer, max_tokens, numbers) for row in rows]


def _example(row: Row, tokenizer: Any, max_tokens: int, numbers: dict[str, int] | None) -> Example:
    if numbers is not None and "label" in row:
        return Example(tokenizer(row["text"]).input_ids[:max_tokens], [], numbers.get(row["label"], IGNORED))
    if "messages" in row:
        ids, labels = _chat(row["messages"], tokenizer)
    elif "text" in row and "label" not in row:
        ids = [*tokenizer(row["text"]).input_ids[: max_tokens - 1], tokenizer.eos_token_id]
        return Example(ids, list(ids))
    else:
        prompt, completion = (
            (row["prompt"], row["completion"]) if "prompt" in row else (row["text"], f" {row['label']}")
        )
        before = tokenizer(prompt).input_ids
        learned = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids, labels = before + learned, [IGNORED] * len(before) + learned
    return Example(ids[-max_tokens:], labels[-max_tokens:])


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for end, turn in enumerate(messages, 1):
        if turn["role"] != "assistant":
            continue
        before = _templated(messages[: end - 1], tokenizer, add_generation_prompt=True)
        after = _templated(messages[:end], tokenizer, add_generation_prompt=False)
        labels += [IGNORED] * (len(before) - len(ids)) + after[len(before) :]
        ids = after
    return ids, labels


def _templated(messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise InputError(
            "the model has no chat template, so it cannot learn from messages: use prompt and completion rows"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template may refuse roles or their order, with an error of its own
        seen = ", ".join(_words(turn["role"] for turn in messages))
        verbatim = str(error) in tokenizer.chat_template  # else the sentence may quote a row
        reason = str(error) if verbatim else type(error).__name__
        raise InputError(
            f"the model's chat template refuses messages of the roles {seen}: {reason}"
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def batches(examples: list[Example], rows: int) -> Iterator[list[Example]]:
    """Groups of at most this many rows of one kind, text or a head's, alike in length so that little is padded."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for headed in (False, True):
        same = [example for example in ordered if (example.answer is not None) is headed]
        for first in range(0, len(same), rows):
            yield same[first : first + rows]


def in_shares(examples: list[Example], shares: Sequence[float], seed: str) -> Iterator[Example]:
    """The examples without end, each in proportion to its share, at least one of which is above 0.

    Passes in a new order each, which leave out what has not yet gathered its whole: one with half of the largest share comes
    in every second pass.
    """
    draw = random.Random(seed)
    gathered, whole = [draw.random() for _ in examples], max(shares)
    while True:
        for number in draw.sample(range(len(examples)), len(examples)):
            gathered[number] += shares[number] / whole
            if gathered[number] >= 1:
                gathered[number] -= 1
                yield examples[number]


def epochs(examples: list[Example], seed: str) -> Iterator[Example]:
    """The examples without end, each pass in a new order; equal seeds give equal orders."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(examples, len(examples))
