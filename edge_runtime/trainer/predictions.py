"""Public texts of a fleet with a head over labels: a device predicts each text's label.

The method is methods/codistill.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import Attached
from edge_runtime.methods import codistill
from edge_runtime.protocol.keys import join
from edge_runtime.trainer import data, public
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import Reporter


class Predictions:
    """The texts of one job, and this device's predictions of them."""

    def __init__(
        self, job: Job, texts: list[data.Row], labels: list[str], met: set[str], read: public.Read
    ) -> None:
        """labels: of the head, in its order. met: the labels of this device's own rows."""
        examples = read([{"text": row["text"], "label": ""} for row in texts])
        self._texts = [text._replace(answer=number) for number, text in enumerate(examples)]
        self._job, self._labels, self._met = job, labels, met
        self._answers = public.DeviceAnswers()

    def lesson(self, shared: public.Shared) -> public.Distillation | None:
        """The fleet's predictions in the global version; None if it has none of these texts."""
        job, count = self._job, len(self._texts)
        targets = {label: shared.get(join("anchors", label, "T")) for label in self._labels}
        # an earlier set of public texts may have had another length
        columns = {label: T[0] for label, T in targets.items() if T is not None and T.shape[1] == count}
        if job.fleet.codistill is None or not columns:
            return None
        absent = np.zeros(count, np.float32)
        votes = np.stack([columns.get(label, absent) for label in self._labels], 1)
        evidence, probabilities = codistill.learned(votes, job.fleet.codistill.temperature)
        news = codistill.news(votes, [label not in self._met for label in self._labels])
        on_device = torch.from_numpy(probabilities).to(job.machine.device)
        return public.weighed(job, self._texts, evidence, news, targets=on_device)

    @torch.no_grad()
    def answer(
        self,
        model: PreTrainedModel,
        adapter: Attached,
        examples: list[data.Example],
        micro_rows: int,
        reporter: Reporter,
    ) -> None:
        """Predict the texts; a text unlike the device's own examples counts less."""
        reporter.tell("predict")
        with reporter.meter.phase("predict"):
            text_states = public.states(model, self._texts, micro_rows)
            alike = public.likeness(public.states(model, public.sample(examples), micro_rows), text_states)
            probabilities = adapter.logits(text_states).softmax(-1) * alike[:, None]
            columns = zip(self._labels, probabilities.T.cpu().numpy(), strict=True)
            self._answers = public.DeviceAnswers(
                {join("anchors", label, "P"): row[None] for label, row in columns}
            )

    def answers(self, tokenizer: Callable[[], Any]) -> public.DeviceAnswers:
        """The predictions, by canonical key."""
        return self._answers
