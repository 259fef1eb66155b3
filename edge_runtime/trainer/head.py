"""A head's labels, and its rows in closed form: their start before a round's steps, their renewal after.

A row that is 0 begins right before the steps. These are the rows of all labels in the first round, of
labels that first appear in a later round, and of labels that only the fleet's predictions have shown.
They start here and not in the version, so their whole value is part of the delta; once the version
has a row, no start replaces it.

Rows K, of labels that no device of the class has examples of, are made anew after the steps of each
round. Steps on unsure targets move such a row slowly, and the targets become better from round to
round. A row that devices of the class have learned from examples is better than one that is made anew.

Equations: methods/head_start.py.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.adapters.attach import Attached
from edge_runtime.errors import InputError
from edge_runtime.methods import head_start
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import LABEL, join, label_of, parse
from edge_runtime.settings import Head
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.examples import Example, Indexed
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.lesson import Distillation
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.states import last_states, sampled


def labels(job: Job, met: set[str]) -> tuple[list[str], frozenset[str]]:
    """The head's labels, sorted: of the device's rows and of the global version; and those whose row is K.

    met: the labels of the device's own rows.

    Raises:
        InputError: a label is too long, or has a control character.
    """
    if job.fleet.head is None:
        return [], frozenset()
    for label in met:
        if not LABEL.fullmatch(label):
            raise InputError(
                f"a label of {len(label)} characters has to be 1 to 80 characters without line breaks, tabs and "
                "other control characters, as a head over labels is exchanged by their names"
            )
    keys = set(chain.from_iterable(codec.shapes(Path(path).read_bytes()) for path in job.start))
    every = met | {label_of(key) for key in keys if parse(key).kind in ("labels", "anchors")}
    if job.fleet.head.shared == "fleet":
        return sorted(every), frozenset()
    return sorted(every), frozenset(label for label in every - met if join("labels", label, "H") not in keys)


@torch.no_grad()
def begin(base: Base, examples: Indexed, lesson: Distillation | None, spec: Head, meter: Meter) -> None:
    """Set the rows that are 0 and whose label the examples or the fleet's predictions show.

    They are set if there is such a row of a label that `start` names. Then the examples, and texts
    of which the fleet has evidence, go through the model once; otherwise nothing does.
    """
    # a row trained from 0 follows what one model's inputs have beside the common frame
    start = spec.start or ("all" if spec.shared == "fleet" else "unseen")
    if start == "zero":
        return
    head = base.adapter.head
    assert head is not None
    # rows of text teach the head nothing
    rows = [row for place in sampled(len(examples)) if (row := examples[place]).headed]
    weights, texts = _of_rows(rows, len(head)), []
    if lesson is not None:
        told = _of_texts(lesson)
        heard = told.max(1) > 0
        texts = [text for text, counts in zip(lesson.texts, heard, strict=True) if counts]
        weights = np.concatenate([weights, told[heard]])
    empty, shown = ~head.any(1).cpu().numpy(), weights.any(0)
    if start == "unseen":
        shown = weights[len(rows) :].any(0)
    if not (empty & shown).any():
        return
    meter.tell("head")
    with meter.phase("head"):
        states = base.adapter.inputs(last_states(base, rows + texts)).cpu().numpy()
        started = head_start.begun(head.cpu().numpy(), states, weights, len(rows))
        head.copy_(torch.from_numpy(started))


@torch.no_grad()
def renew(adapter: Attached, rows: Sequence[Example], states: torch.Tensor, lesson: Distillation) -> None:
    """Make the rows K anew whose labels the fleet's predictions show.

    states: last hidden states of the rows, and then of the lesson's texts.
    """
    head = adapter.head
    assert head is not None
    told = _of_texts(lesson)
    renewed = told.any(0) & np.array([label in adapter.heard for label in adapter.labels], bool)
    weights = np.concatenate([_of_rows(rows, len(head)), told])
    before = np.where(renewed[:, None], np.float32(0), head.cpu().numpy())
    inputs = adapter.inputs(states).cpu().numpy()
    head.copy_(torch.from_numpy(head_start.begun(before, inputs, weights, len(rows))))


def _of_rows(rows: Sequence[Example], labels: int) -> NDArray[np.float32]:
    """Weights (rows, labels): 1 for each row's label; a row of text has none."""
    weights = np.zeros((len(rows), labels), np.float32)
    for number, row in enumerate(rows):
        if row.answer is not None:
            weights[number, row.answer] = 1
    return weights


def _of_texts(lesson: Distillation) -> NDArray[np.float32]:
    """Weights g (texts, labels) of head_start.py."""
    assert lesson.targets is not None
    weights: NDArray[np.float32] = np.sqrt(lesson.evidence)[:, None] * lesson.targets.cpu().numpy()
    return weights
