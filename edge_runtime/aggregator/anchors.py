"""The public texts of a fleet that distils, as its node serves them: what is asked alone, whatever else their rows have."""

from pathlib import Path

from edge_runtime.errors import InputError
from edge_runtime.settings import Fleet
from edge_runtime.trainer import data


def read(fleet: Fleet) -> list[data.Row]:
    """The first `texts` rows of the fleet's file, as devices are asked them; none where the fleet does not distil.

    Raises:
        InputError: the fleet's file cannot be read, or has too few rows that can be used.
    """
    if fleet.codistill is None:
        return []
    spec, headed = fleet.codistill, fleet.head is not None  # a head tells labels of texts alone
    asked = [_asked(row) for row in data.read_rows(Path(spec.anchors))]
    texts = [row for row in asked if row.get("text", "").strip() or ("messages" in row and not headed)]
    if len(texts) < spec.texts:
        what = "a text or a prompt" if headed else "a text, a prompt or messages"
        raise InputError(
            f"[codistill] texts is {spec.texts}, but {spec.anchors} has {len(texts)} rows with {what}: lower it, or add rows"
        )
    return texts[: spec.texts]


def _asked(row: data.Row) -> data.Row:
    """A row's text or prompt, or its messages before the assistant's last."""
    if "messages" not in row:
        return {"text": row.get("text", row.get("prompt"))}
    messages = row["messages"]
    last = max(number for number, turn in enumerate(messages) if turn["role"] == "assistant")
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages[:last]]}
