"""Stage "train": the steps of a round on a loaded model, kept within the job's memory budget."""

import time
from itertools import pairwise
from typing import NamedTuple

import torch

from edge_runtime.adapters.attach import Attached
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
from edge_runtime.trainer.limit import Limit
from edge_runtime.trainer.meter import Meter, Reporter, release
from edge_runtime.trainer.public import Distillation


class Trained(NamedTuple):
    """How the steps of a round went."""

    losses: list[float]  # by step, nan where it was skipped
    step_seconds: list[float]
    easings: list[Easing]
    micro_rows: int  # rows that went through the model at once in the last step


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
    depths = job.depths if method.exchanges_layers else (plan.depth,)
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
