"""Stage "read rows": a device's rows, held-out rows and public texts as token sequences.

The tokenizer lives in this stage alone; it is dropped before the base model is loaded.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.errors import InputError
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import LABEL, label_of, parse
from edge_runtime.trainer import data, public
from edge_runtime.trainer.completions import Completions
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.predictions import Predictions


class Material(NamedTuple):
    """Everything that a job reads before it loads the model."""

    examples: list[data.Example]  # the device's own rows; none for an evaluation alone
    held_out: dict[str, list[data.Example]]  # by name
    labels: list[str]  # that the head tells apart; none: no head
    met: set[str]  # labels of the device's own rows
    public: Completions | Predictions | None


def read(job: Job, tokenizer: Any) -> Material:
    """Read and tokenize; raises InputError naming the file, line or setting that does not fit."""
    rows = data.read_rows(Path(job.data))
    met = data.labels_of(rows)
    labels = head_labels(job, met)
    tokenize = partial(data.tokenize, tokenizer=tokenizer, max_tokens=job.plan.tokens, labels=labels or None)
    return Material(
        examples=tokenize(rows) if job.train else [],
        held_out={name: tokenize(data.read_rows(Path(path))) for name, path in job.evaluation.items()},
        labels=labels,
        met=met,
        public=_public(job, labels, met, tokenizer, tokenize),
    )


def _public(
    job: Job, labels: list[str], met: set[str], tokenizer: Any, tokenize: public.Read
) -> Completions | Predictions | None:
    texts, codistill = public.rows(job), job.fleet.codistill
    if not texts or codistill is None:
        return None
    if job.fleet.head is None:
        return Completions(job, codistill, texts, tokenizer, tokenize)
    return Predictions(job, texts, labels, met, tokenize) if labels else None


def head_labels(job: Job, met: set[str]) -> list[str]:
    """The head's labels, sorted: of this device's rows, and of the global version."""
    if job.fleet.head is None:
        return []
    for label in met:
        if not LABEL.fullmatch(label):
            raise InputError(
                f"a label of {len(label)} characters has to be 1 to 80 characters without line breaks or tabs, as a "
                "head over labels is exchanged by their names"
            )
    keys = codec.shapes(Path(job.start).read_bytes()) if job.start is not None else {}
    return sorted(met | {label_of(key) for key in keys if parse(key).kind in ("labels", "anchors")})
