"""Who does the work of a round on a device: planner and trainer, or a benchmark's stand-ins."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.planner import Planned, Request, Unplanned, find_plan
from edge_runtime.agent.trainer import Ended, Running, Trainer
from edge_runtime.trainer.job import Job, Progress


class Workers(NamedTuple):
    """Who does the work on a device; a benchmark of the link puts others in their place."""

    find_plan: Callable[[Request], Planned | Unplanned]  # called in a thread
    # Starts a job in its folder and returns at once; progress and end are posted later.
    train: Callable[[Job, Path, Callable[[Progress | Ended], None]], Running]


def workers_of(options: DeviceOptions) -> Workers:
    """The planner and the trainer of this package."""
    return Workers(partial(find_plan, options=options), Trainer)
