"""The fleet's public texts: what a device learns from them, and its own answers to them.

    a head over labels    Predictions: each device predicts every text's label
    no head               completions.py: each device completes every text

A device learns the fleet's answers beside its own rows (Distillation), and sends its own answers.
The equations are those of methods/codistill.py: evidence e, news u, the ramp, and likeness s.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.adapters.attach import State
from edge_runtime.errors import InputError
from edge_runtime.methods import codistill
from edge_runtime.planning.stages import MOST_ROWS
from edge_runtime.protocol.keys import join
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.data import Row
from edge_runtime.trainer.examples import Example, Examples, batches, in_shares
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.objectives import hidden_states, label_states
from edge_runtime.trainer.tokens import Tokenization
from edge_runtime.trainer.vocabulary import language_head


class Distillation(NamedTuple):
    """Public texts that join the steps of a round, with the fleet's answers."""

    texts: list[Example]  # with completions; or, for a head, the answer is the row in targets
    evidence: NDArray[Any]  # (texts,), how sure the fleet is of each answer, 0 to 1
    shares: list[float]  # how much each text counts in this round, 0 to 1
    targets: torch.Tensor | None  # (texts, labels), probabilities, for a head over labels
    weight: float  # of the texts' mean loss beside the mean loss of the device's own rows
    rows: int  # texts in a step


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
        self._votes = job.fleet.codistill.votes
        self._truth = np.array([row.get("label", "") for row in texts])
        if self._votes == "oracle" and not self._truth.all():
            raise InputError('[codistill] votes is "oracle", but the public texts have no labels')
        examples = how.examples({"text": row["text"], "label": ""} for row in texts)
        self._texts = [text._replace(answer=number) for number, text in enumerate(examples)]
        self._job, self._labels, self._met = job, labels, met
        self._answers = DeviceAnswers()

    def lesson(self, shared: State) -> Distillation | None:
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
        return weighed(job, self._texts, evidence, news, targets=on_device)

    @torch.no_grad()
    def answer(self, base: Base, examples: Examples, meter: Meter) -> None:
        """Predict the texts, as `votes` says; a text unlike the device's own examples counts less."""
        meter.tell("predict")
        with meter.phase("predict"):
            if self._votes == "oracle":
                columns = {label: np.float32(self._truth == label) for label in sorted(set(self._truth))}
            else:
                states, alike = compared(base, sample(examples), self._texts)
                weights = alike[:, None] if self._votes == "weighted" else 1.0
                probabilities = base.adapter.logits(states).softmax(-1) * weights
                columns = dict(zip(self._labels, probabilities.T.cpu().numpy(), strict=True))
            predictions = {join("anchors", label, "P"): row[None] for label, row in columns.items()}
            self._answers = DeviceAnswers(predictions)

    def answers(self, tokenizer: Callable[[], Any]) -> DeviceAnswers:
        """The predictions, by canonical key."""
        return self._answers


def weighed(
    job: Job,
    texts: list[Example],
    evidence: NDArray[Any],
    news: NDArray[Any] | float = 0.0,
    covered: float = 1.0,
    targets: torch.Tensor | None = None,
) -> Distillation | None:
    """The distillation of the job's round; None if the fleet has no evidence yet.

    Args:
        evidence: e(a), how sure the fleet is of each text's answer, 0 to 1.
        news: u(a), how much of each answer is new to this device, 0 to 1.
        covered: share of all public texts that these are; the weight is of the mean over all.
    """
    spec = job.fleet.codistill
    if spec is None or not evidence.any():
        return None
    ramp = codistill.ramp(job.round, job.fleet.rounds)
    shares = evidence * (news + (1 - news) * ramp)
    count = max(round(spec.rows * covered * float(shares.sum() / evidence.sum())), 1)
    return Distillation(texts, evidence, shares.tolist(), targets, spec.weight * covered, count)


def drawn(distillation: Distillation | None, seed: str) -> tuple[Iterator[Example], int, float]:
    """Texts without end, the number to take for a step, and the weight of their mean loss in it.

    A text is drawn as often as it counts, and then counts in full: no step spends time on texts
    that are worth little.
    """
    if distillation is None:
        return iter(()), 0, 0.0
    texts, _, shares, _, weight, count = distillation
    return in_shares(texts, shares, seed), count, weight * sum(shares) / len(shares)


def sample(examples: Examples) -> list[Example]:
    """The examples of the rows that are compared with public texts; of one row if none of these has one."""
    places = [place for number in sampled(examples.count) if (place := examples.place(number)) is not None]
    return [examples[place] for place in places or [0]]


def sampled(count: int) -> range:
    """The numbers of the rows that are compared with public texts, of so many: MOST_ROWS, evenly spaced."""
    return range(0, count, -(-count // MOST_ROWS) or 1)


def compared(base: Base, rows: list[Example], texts: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The texts' last hidden states (texts, hidden), and their likeness to the device's rows (texts,)."""
    text_states = last_states(base, texts)
    return text_states, likeness(last_states(base, rows), text_states)


@torch.no_grad()
def last_states(base: Base, examples: list[Example]) -> torch.Tensor:
    """The last token's hidden state of each: (examples, hidden) in float32, of equal length."""
    model, device = base.model, language_head(base.model).weight.device
    last = torch.empty(len(examples), model.config.get_text_config().hidden_size, device=device)
    numbered = [example._replace(answer=number) for number, example in enumerate(examples)]
    for batch in batches(numbered, base.plan.rows):
        last[[row.answer or 0 for row in batch]] = label_states(batch, hidden_states(model, batch)[0])
        release()
    return last


def likeness(own_states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """How much texts are like own rows: the root of a conformal p-value (texts,), at most 1.

    The p-value is the share of own rows whose nearest other row is no nearer than the text's
    nearest row, by cosine. Both arguments are (rows, hidden), of equal length each.

    Source: Vovk et al. 2005, Algorithmic Learning in a Random World, with the distance to the
    nearest neighbour.
    """
    among = (own_states @ own_states.T).fill_diagonal_(-torch.inf).amax(1)
    nearest = (texts @ own_states.T).amax(1)
    return (((among[None] <= nearest[:, None]).sum(1) + 1) / (len(own_states) + 1)).sqrt()
