"""The public texts of a fleet that distils, as its node serves them: each row's question alone."""

from pathlib import Path

from edge_runtime.errors import InputError
from edge_runtime.settings import Fleet
from edge_runtime.trainer import data


def read(fleet: Fleet) -> list[data.Row]:
    """The first `texts` usable rows of the fleet's file; no rows where the fleet does not distil.

    Raises:
        InputError: the fleet's file cannot be read, or has too few rows that can be used.
    """
    if fleet.codistill is None:
        return []
    spec, headed = fleet.codistill, fleet.head is not None  # a head classifies texts, not messages
    questions = [_question(row) for row in data.read_rows(Path(spec.anchors))]
    usable = [row for row in questions if row.get("text", "").strip() or ("messages" in row and not headed)]
    if len(usable) < spec.texts:
        needed = "a text or a prompt" if headed else "a text, a prompt or messages"
        raise InputError(
            f"[codistill] texts is {spec.texts}, but {spec.anchors} has {len(usable)} rows with {needed}: lower it, or "
            "add rows"
        )
    return usable[: spec.texts]


def _question(row: data.Row) -> data.Row:
    """A row's text or prompt, or its messages before the assistant's last message."""
    if "messages" not in row:
        return {"text": row.get("text", row.get("prompt"))}
    messages = row["messages"]
    last = max(number for number, turn in enumerate(messages) if turn["role"] == "assistant")
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages[:last]]}
