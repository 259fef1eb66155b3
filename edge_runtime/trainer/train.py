"""Stage "train": the steps of a round on a loaded model, kept within the job's memory budget.

The peak of each step decides the plan of the next.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from edge_profiles import format_size

from edge_runtime.adapters.attach import Attached
from edge_runtime.errors import MemoryShortError
from edge_runtime.methods.interface import Method
from edge_runtime.models.slices import nested_blocks
from edge_runtime.planning.candidates import lower
from edge_runtime.planning.predict import loss_chunk_bytes
from edge_runtime.planning.workload import Workload
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Easing
from edge_runtime.trainer import step
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.data import Example
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import Meter, Reporter, release
from edge_runtime.trainer.public import Distillation

NEAR = 0.98  # share of the budget; rows differ in length, and a later step may take more


class Trained(NamedTuple):
    """How the steps of a round went."""

    losses: list[float]  # by step, nan where it was skipped
    step_seconds: list[float]
    easings: list[Easing]
    micro_rows: int  # rows that went through the model at once in the last step


class Limit:
    """The budget of a round, and the plans that it may still fall back on."""

    def __init__(self, budget_bytes: int, plan: Plan, lower: Sequence[Plan], lap: Callable[[], int]) -> None:
        """Start with a plan.

        Args:
            plan: the plan of the running steps.
            lower: plans to fall back on, each in less memory than the one before.
            lap: returns the peak in bytes since its last call.
        """
        self._budget_bytes, self._lap = budget_bytes, lap
        self._plan, self._lower = plan, list(lower)

    def ease(self) -> Plan | None:
        """The plan of the next step, cheaper when memory is short; None: continue unchanged.

        Call it after each step. It takes the first plan that is predicted to save enough. If none
        does, and the step was still within the budget, it takes the cheapest.

        Raises:
            MemoryShortError: the step took more than the budget, and no plan saves enough.
        """
        peak = self._lap()
        if peak <= NEAR * self._budget_bytes:
            return None
        # predictions may be off by a constant: the plan has to save what the step took too much
        target = self._plan.predicted_peak_bytes - (peak - NEAR * self._budget_bytes)
        enough = [plan for plan in self._lower if plan.predicted_peak_bytes <= target]
        if peak > self._budget_bytes and not enough:
            raise MemoryShortError(
                f"a step took {format_size(peak)} of a budget of {format_size(self._budget_bytes)}, and was to take "
                f"{format_size(self._plan.predicted_peak_bytes)}; a smaller model, rank or length is needed"
            )
        if not self._lower:
            return None
        self._plan = (enough or self._lower[-1:])[0]
        self._lower = self._lower[self._lower.index(self._plan) + 1 :]
        return self._plan


class _Steps:
    """The running steps: their clock, and the plan that they follow."""

    def __init__(self, job: Job, limit: Limit | None, base: Base, reporter: Reporter) -> None:
        self._count, self._limit = job.fleet.training.steps, limit
        self._base, self._reporter = base, reporter
        self.micro_rows, self.easings = job.plan.rows, list[Easing]()
        self.ends = [time.monotonic()]

    def report(self, number: int, loss: float | None) -> None:
        """Note the end of a step."""
        self.ends.append(time.monotonic())
        self._reporter.tell("train", number, self._count, loss)

    def ease(self) -> Plan | None:
        """Move to a cheaper plan when memory is short; None: continue unchanged."""
        plan = self._limit.ease() if self._limit is not None else None
        if plan is None:
            return None
        self._base.retile(plan.mlp_tokens)
        self.easings.append(Easing(plan.rows, plan.boundaries, plan.mlp_tokens, plan.kept_blocks))
        self.micro_rows = plan.rows
        release()
        if self._reporter.meter.cuda:
            # else reserved memory would count towards the next step's peak
            torch.cuda.empty_cache()
        # reset the peak, so that the next step is measured on its own
        self._reporter.meter.lap()
        return plan


def train(
    job: Job,
    method: Method,
    base: Base,
    adapter: Attached,
    examples: list[Example],
    distillation: Distillation | None,
    reporter: Reporter,
) -> Trained:
    """Make the steps of the job's round; raises as step.train and Limit.ease do."""
    plan = job.plan
    steps = _Steps(job, _limit(job, reporter.meter), base, reporter)
    depths = job.depths if "layers" in method.merges else (plan.depth,)
    round_settings = step.RoundSettings(
        training=job.fleet.training,
        slices=nested_blocks(depths, plan.depth, job.facts.layers),
        micro_rows=plan.rows,
        round=job.round,
        rounds=job.fleet.rounds,
        seed=job.fleet.seed,
        passes=method.passes(job.round),
        boundaries=plan.boundaries,
        kept_blocks=plan.kept_blocks,
        loss_chunk_bytes=loss_chunk_bytes(plan),
    )
    with reporter.meter.phase("train"):
        losses = step.train(
            base.model,
            adapter,
            examples,
            round_settings,
            distillation=distillation,
            progress=steps.report,
            ease=steps.ease,
        )
    seconds = [end - begin for begin, end in pairwise(steps.ends)]
    return Trained(losses, seconds, steps.easings, steps.micro_rows)


def _limit(job: Job, meter: Meter) -> Limit | None:
    budget = job.machine.budget_bytes
    if budget is None:
        return None
    present, *cheaper = lower(Workload.of(job.fleet, job.facts, job.plan.terms["runtime"]), job.plan)
    return Limit(budget, present, cheaper, meter.lap)
