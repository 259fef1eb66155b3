"""Reads a device's rows, and makes token sequences of them that mark the learned tokens.

    {"prompt", "completion"}    the completion and the end-of-text token are learned
    {"messages": [...]}         the assistant's turns are learned, in the model's chat template
    {"text"}                    every token is learned
    {"text", "label"}           the label, written after the text, is learned; or a head learns it

This file imports no torch: the agent checks its data before it connects to anything.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.errors import InputError

IGNORED = -100  # label of a token that is not learned, as torch's cross-entropy has it
FORMS: list[set[str]] = [{"prompt", "completion"}, {"messages"}, {"text"}, {"text", "label"}]

Row = dict[str, Any]


class Example(NamedTuple):
    """A row as tokens; at least one of them is learned, unless a head learns the row's label."""

    ids: list[int]
    labels: list[int]  # each token if it is learned, else IGNORED; empty if a head learns the row
    answer: int | None = None  # number of the label, IGNORED if the head lacks it; None: text

    @property
    def headed(self) -> bool:
        """Whether a head learns the row's label."""
        return self.answer is not None

    @property
    def counted(self) -> int:
        """Learned labels. The first token is never among them: no token before it predicts it."""
        if self.headed:
            return int(self.answer != IGNORED)
        return sum(label != IGNORED for label in self.labels[1:])


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl file.

    Raises:
        InputError: the file is missing or empty, or a row, named by its line, has none of the
            forms above.
    """
    try:
        # not splitlines: a JSON text may hold U+2028 and the like
        lines = path.read_text(encoding="utf-8").split("\n")
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
    keys = row.keys() & set().union(*FORMS)
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
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's, but it has to answer something")


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows as a .jsonl file; returns its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows: a tenth is held out, at most 200, after a seeded shuffle."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    count = min(len(rows) // 10, 200)
    return shuffled[count:], shuffled[:count]


def labels_of(rows: list[Row]) -> set[str]:
    """The distinct labels of rows."""
    return {row["label"] for row in rows if "label" in row}


def tokenize(
    rows: list[Row], tokenizer: Any, max_tokens: int, labels: Sequence[str] | None = None
) -> list[Example]:
    """Token sequences of at most max_tokens.

    A prompt is cut at its beginning, plain text and a head's text at their end.

    Args:
        labels: the labels of a head, by number; None: labels are learned as text.

    Raises:
        InputError: the model has no chat template for messages, or its template refuses them.
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
        # tokenized apart: a token must not join the prompt's end and the completion's beginning
        before = tokenizer(prompt).input_ids
        learned = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids, labels = before + learned, [IGNORED] * len(before) + learned
    return Example(ids[-max_tokens:], labels[-max_tokens:])


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    # each answer is what the template adds to the turns before it
    for end, turn in enumerate(messages, 1):
        if turn["role"] != "assistant":
            continue
        before = templated(messages[: end - 1], tokenizer, add_generation_prompt=True)
        after = templated(messages[:end], tokenizer, add_generation_prompt=False)
        labels += [IGNORED] * (len(before) - len(ids)) + after[len(before) :]
        ids = after
    return ids, labels


def templated(messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool) -> list[int]:
    """Token ids of messages in the model's chat template; raises InputError as `tokenize` does."""
    if not tokenizer.chat_template:
        raise InputError(
            "the model has no chat template, so it cannot learn from messages: use prompt and completion rows"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    # a template may refuse roles or their order, with an error of its own
    except Exception as error:
        seen = ", ".join(_words(turn["role"] for turn in messages))
        verbatim = str(error) in tokenizer.chat_template  # else the sentence may quote a row
        reason = str(error) if verbatim else type(error).__name__
        raise InputError(
            f"the model's chat template refuses messages of the roles {seen}: {reason}"
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def batches(examples: list[Example], rows: int) -> Iterator[list[Example]]:
    """Groups of at most `rows` examples of one kind, alike in length so that little is padded."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for headed in (False, True):
        alike = [example for example in ordered if example.headed is headed]
        for first in range(0, len(alike), rows):
            yield alike[first : first + rows]


def in_shares(examples: list[Example], shares: Sequence[float], seed: str) -> Iterator[Example]:
    """The examples without end, each as often as its share says; at least one share is above 0.

    Each pass has a new order. An example of the largest share comes in every pass, and an example
    of half that share in every second.
    """
    draw = random.Random(seed)
    credits, largest = [draw.random() for _ in examples], max(shares)
    while True:
        for number in draw.sample(range(len(examples)), len(examples)):
            credits[number] += shares[number] / largest
            if credits[number] >= 1:
                credits[number] -= 1
                yield examples[number]


def epochs(examples: list[Example], seed: str) -> Iterator[Example]:
    """The examples without end, each pass in a new order; equal seeds give equal orders."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(examples, len(examples))
