"""Rows of the label head that are 0 get their start, right before the steps of a round.

They are the rows of all labels in the first round, of labels that first appear in a later round, and
of labels that only the fleet's predictions have shown. Equations: methods/head_start.py. They start
here and not in the version, so their whole value is part of the delta; once the version has a row, no
start replaces it.
"""

import numpy as np
import torch

from edge_runtime.methods import head_start
from edge_runtime.settings import Head
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.examples import Indexed
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.public import Distillation, last_states, sampled


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
    weights = np.zeros((len(rows), len(head)), np.float32)
    weights[range(len(rows)), [row.answer or 0 for row in rows]] = 1
    texts = []
    if lesson is not None and lesson.targets is not None:
        told = lesson.evidence[:, None] * lesson.targets.cpu().numpy()
        heard = told.any(1)
        texts = [text for text, counts in zip(lesson.texts, heard, strict=True) if counts]
        weights = np.concatenate([weights, told[heard]])
    empty, shown = ~head.any(1).cpu().numpy(), weights.any(0)
    if start == "unseen":
        shown &= ~weights[: len(rows)].any(0)
    if not (empty & shown).any():
        return
    meter.tell("head")
    with meter.phase("head"):
        states = base.adapter.inputs(last_states(base, rows + texts)).cpu().numpy()
        started = head_start.begun(head.cpu().numpy(), states, weights, len(rows))
        head.copy_(torch.from_numpy(started))
