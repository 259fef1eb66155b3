"""A device's answers to the fleet's public texts.

    a head over labels    Predictions: each device predicts every text's label
    no head               completions.py: each device completes every text

What a device learns of the fleet's answers is in lesson.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from edge_runtime.adapters.attach import State
from edge_runtime.errors import InputError
from edge_runtime.methods import codistill
from edge_runtime.protocol.keys import join
from edge_runtime.trainer import head
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.data import Row
from edge_runtime.trainer.examples import Examples
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.lesson import Distillation, weighed
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.states import last_states, likeness, sample
from edge_runtime.trainer.tokens import Tokenization


class DeviceAnswers(NamedTuple):
    """A device's answers, which travel beside its delta; no residual is kept of them."""

    predictions: State = {}
    completions: bytes = b""  # encoded by protocol/completion.py


class Predictions:
    """The texts of one job, and this device's predictions of their labels."""

    def __init__(
        self, job: Job, texts: list[Row], labels: list[str], met: set[str], how: Tokenization
    ) -> None:
        """Tokenize the texts.

        Args:
            labels: of the head, in its order.
            met: the labels of this device's own rows.

        Raises:
            InputError: devices answer with the texts' true labels, but a text has none.
        """
        assert job.fleet.codistill is not None
        self._spec = job.fleet.codistill
        self._truth = np.array([row.get("label", "") for row in texts])
        if self._spec.votes == "oracle" and not self._truth.all():
            raise InputError('[codistill] votes is "oracle", but the public texts have no labels')
        examples = how.examples({"text": row["text"], "label": ""} for row in texts)
        self._texts = [text._replace(answer=number) for number, text in enumerate(examples)]
        self._job, self._labels = job, labels
        self._unmet = [label not in met for label in labels]
        self._renews = job.fleet.head is not None and job.fleet.head.start != "zero"
        self._lesson: Distillation | None = None
        self._answers = DeviceAnswers()

    def lesson(self, shared: State) -> Distillation | None:
        """The fleet's predictions in the global version; None if it has none of these texts."""
        job, count = self._job, len(self._texts)
        targets = {label: shared.get(join("anchors", label, "T")) for label in self._labels}
        # an earlier set of public texts may have had another length
        columns = {label: T[0] for label, T in targets.items() if T is not None and T.shape[1] == count}
        if not columns:
            return None
        absent = np.zeros(count, np.float32)
        votes = np.stack([columns.get(label, absent) for label in self._labels], 1)
        evidence, probabilities = codistill.learned(votes, self._spec.temperature)
        news = codistill.news(votes, self._unmet)
        on_device = torch.from_numpy(probabilities).to(job.machine.device)
        self._lesson = weighed(job, self._texts, evidence, news, targets=on_device)
        return self._lesson

    @torch.no_grad()
    def answer(self, base: Base, examples: Examples, meter: Meter) -> None:
        """Renew the head's rows, and predict the texts as `votes` says.

        A text unlike the device's own examples counts less.
        """
        meter.tell("predict")
        with meter.phase("predict"):
            rows = sample(examples)
            rows = [row for row in rows if row.headed] or rows  # rows of text teach the head nothing
            states = last_states(base, rows + self._texts)
            if self._lesson is not None and self._renews:
                head.renew(base.adapter, rows, states, self._lesson)
            own, texts = states[: len(rows)], states[len(rows) :]
            if self._spec.votes == "oracle":
                columns = {label: np.float32(self._truth == label) for label in sorted(set(self._truth))}
            else:
                weights = likeness(own, texts)[:, None] if self._spec.votes == "weighted" else 1.0
                probabilities = base.adapter.logits(texts).softmax(-1) * weights
                columns = dict(zip(self._labels, probabilities.T.cpu().numpy(), strict=True))
            predictions = {join("anchors", label, "P"): row[None] for label, row in columns.items()}
            self._answers = DeviceAnswers(predictions)

    def answers(self, tokenizer: Callable[[], Any]) -> DeviceAnswers:
        """The predictions, by canonical key."""
        return self._answers
