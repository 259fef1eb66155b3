"""The fleet's answers to public texts, as a round's steps learn them.

The equations are those of methods/codistill.py: evidence e, news u and the ramp.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from edge_runtime.methods import codistill
from edge_runtime.trainer.examples import Example, in_shares
from edge_runtime.trainer.job import Job


class Distillation(NamedTuple):
    """Public texts that join the steps of a round, with the fleet's answers."""

    texts: list[Example]  # with completions; or, for a head, the answer is the row in targets
    evidence: NDArray[Any]  # (texts,), how sure the fleet is of each answer, 0 to 1
    shares: list[float]  # how much each text counts in this round, 0 to 1
    targets: torch.Tensor | None  # (texts, labels), probabilities, for a head over labels
    weight: float  # of the texts' mean loss beside the mean loss of the device's own rows
    rows: int  # texts in a step


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
    assert spec is not None  # there are no answers without [codistill]
    if not evidence.any():
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
