"""The fleet's public texts: what both forms of answers to them share.

    a head over labels    predictions.py: each device predicts every text's label
    no head               completions.py: each device completes every text

A device learns the fleet's answers beside its own rows (Distillation), and sends its own answers.
The equations are those of methods/codistill.py: evidence e, news u, the ramp, and likeness s.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import State
from edge_runtime.errors import InputError
from edge_runtime.methods import codistill
from edge_runtime.trainer import data
from edge_runtime.trainer.data import Example
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import release
from edge_runtime.trainer.micro_batch import pad
from edge_runtime.trainer.objectives import hidden_states, label_states
from edge_runtime.trainer.vocabulary import language_head

MOST_ROWS = 512  # of the device's own that texts are compared with, evenly spaced

Read = Callable[[list[data.Row]], list[Example]]  # tokenizes rows as the job's are
Shared = Mapping[str, NDArray[np.float32]]  # the global version


class Distillation(NamedTuple):
    """Public texts that join the steps of a round, with the fleet's answers."""

    texts: list[Example]  # with completions; or, for a head, the answer is the row in targets
    shares: list[float]  # how much each text counts, 0 to 1
    targets: torch.Tensor | None  # (texts, labels), probabilities, for a head over labels
    weight: float  # of the texts' mean loss beside the mean loss of the device's own rows
    rows: int  # texts in a step


class DeviceAnswers(NamedTuple):
    """A device's answers, which travel beside its delta; no residual is kept of them."""

    predictions: State = {}
    completions: bytes = b""  # encoded by protocol/completion.py


def rows(job: Job) -> list[data.Row]:
    """The public texts; raises InputError if the file has fewer than the fleet's settings say."""
    if job.anchors is None:
        return []
    assert job.fleet.codistill is not None
    texts, count = data.read_prompts(Path(job.anchors)), job.fleet.codistill.texts
    if len(texts) < count:
        raise InputError(f"the fleet has {count} public texts, but its file has {len(texts)} rows")
    return texts[:count]


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
    return Distillation(texts, shares.tolist(), targets, spec.weight * covered, count)


def drawn(distillation: Distillation | None, seed: str) -> tuple[Iterator[Example], int, float]:
    """Texts without end, the number to take for a step, and the weight of their mean loss in it.

    A text is drawn as often as it counts, and then counts in full: no step spends time on texts
    that are worth little.
    """
    if distillation is None:
        return iter(()), 0, 0.0
    texts, shares, _, weight, count = distillation
    return data.in_shares(texts, shares, seed), count, weight * sum(shares) / len(shares)


@torch.no_grad()
def states(model: PreTrainedModel, examples: list[Example], micro_rows: int) -> torch.Tensor:
    """The last token's hidden state of each: (examples, hidden) in float32, of equal length."""
    device = language_head(model).weight.device
    last = torch.empty(len(examples), model.config.get_text_config().hidden_size, device=device)
    numbered = [example._replace(answer=number) for number, example in enumerate(examples)]
    for batch in data.batches(numbered, micro_rows):
        ids, _ = pad(batch, device)
        last[[row.answer or 0 for row in batch]] = label_states(batch, hidden_states(model, ids))
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


def sample(examples: list[Example]) -> list[Example]:
    """At most MOST_ROWS of the examples."""
    return examples[:: -(-len(examples) // MOST_ROWS)]
