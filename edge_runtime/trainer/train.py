"""Stage "train": the steps of a round on a loaded model, kept within the job's memory budget.

The peak of each step decides the plan of the next.
"""

import math
import time
from itertools import pairwise
from typing import NamedTuple

import torch
from edge_profiles import format_size

from edge_runtime.errors import MemoryShortError
from edge_runtime.methods.interface import Method
from edge_runtime.models.slices import nested_blocks
from edge_runtime.planning.candidates import lower
from edge_runtime.planning.predict import Workload, loss_chunk_bytes
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Easing
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.examples import Indexed
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.lesson import Distillation
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.step import Learner, RoundSettings

NEAR = 0.98  # share of the budget; rows differ in length, and a later step may take more


class Trained(NamedTuple):
    """How the steps of a round went."""

    losses: list[float]  # by step, nan where it was skipped
    step_seconds: list[float]
    easings: list[Easing]


def train(
    job: Job,
    method: Method,
    base: Base,
    examples: Indexed,
    distillation: Distillation | None,
    meter: Meter,
) -> Trained:
    """Make the steps of the job's round; raises as Learner.step and eased do."""
    steps, budget_bytes = job.fleet.training.steps, job.machine.budget_bytes
    plans = [job.plan]
    if budget_bytes is not None:
        plans = lower(Workload(job.fleet, job.facts, job.plan.terms["runtime"]), job.plan)
    easings: list[Easing] = []
    with meter.phase("train"):
        ends = [time.monotonic()]
        learner = Learner(base.model, base.adapter, examples, _round_settings(job, method), distillation)
        for number in range(1, steps + 1):
            loss = learner.step(base.plan.rows, base.plan.boundaries, base.plan.kept_blocks)
            ends.append(time.monotonic())
            meter.tell("train", number, steps, loss if math.isfinite(loss) else None)
            if budget_bytes is None:
                continue
            present, plans = plans[0], eased(plans, meter.lap(), budget_bytes)
            plan = plans[0]
            if plan is present:
                continue
            base.follow(plan)
            easings.append(Easing(plan.rows, plan.boundaries, plan.mlp_tokens, plan.kept_blocks))
            release()
            if meter.cuda:
                # else reserved memory would count towards the next step's peak
                torch.cuda.empty_cache()
            # reset the peak, so that the next step is measured on its own
            meter.lap()
        learner.close()
    seconds = [end - begin for begin, end in pairwise(ends)]
    return Trained(learner.losses, seconds, easings)


def _round_settings(job: Job, method: Method) -> RoundSettings:
    plan, fleet = job.plan, job.fleet
    depths = job.depths if "layers" in method.merges else (plan.depth,)
    return RoundSettings(
        training=fleet.training,
        slices=nested_blocks(depths, plan.depth, job.facts.layers),
        ranks=method.turns(plan.rank, fleet.adapter.lower),
        round=job.round,
        rounds=fleet.rounds,
        seed=fleet.seed,
        passes=method.passes(job.round),
        loss_chunk_bytes=loss_chunk_bytes(plan),
    )


def eased(plans: list[Plan], peak_bytes: int, budget_bytes: int) -> list[Plan]:
    """The plans from the next step's on, after a step with this peak.

    Where memory is short, the next plan is the first that is predicted to save enough. If none
    does, and the step was still within the budget, it is the cheapest.

    Args:
        plans: the present plan, and those to fall back on, each in less memory than the one before.

    Raises:
        MemoryShortError: the step took more than the budget, and no plan saves enough.
    """
    if peak_bytes <= NEAR * budget_bytes:
        return plans
    # predictions may be off by a constant: the plan has to save what the step took too much
    predicted_bytes = plans[0].predicted_peak_bytes
    target = predicted_bytes - (peak_bytes - NEAR * budget_bytes)
    for number, plan in enumerate(plans):
        if plan.predicted_peak_bytes <= target:
            return plans[number:]
    if peak_bytes > budget_bytes:
        raise MemoryShortError(
            f"a step took {format_size(peak_bytes)} of a budget of {format_size(budget_bytes)}, and was to take "
            f"{format_size(predicted_bytes)}; a smaller model, rank or length is needed"
        )
    return plans[-1:]
