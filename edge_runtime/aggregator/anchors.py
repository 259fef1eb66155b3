"""The public texts of a fleet that distils, as its node serves them: texts or prompts alone, whatever else their rows have."""

from pathlib import Path

from edge_runtime.errors import InputError
from edge_runtime.settings import Codistill
from edge_runtime.training import data


def write(spec: Codistill, folder: Path) -> Path:
    """Write the first `texts` rows into the folder; returns the file.

    Raises:
        InputError: the fleet's file cannot be read, or has too few rows with a text or a prompt.
    """
    rows = data.read_rows(Path(spec.anchors))
    texts = [row[name] for row in rows for name in ("text", "prompt") if row.get(name, "").strip()]
    if len(texts) < spec.texts:
        raise InputError(
            f"[codistill] texts is {spec.texts}, but {spec.anchors} has {len(texts)} rows with a text or a prompt: lower it, or "
            "add rows"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return data.write_rows(folder / "anchors.jsonl", [{"text": text} for text in texts[: spec.texts]])
