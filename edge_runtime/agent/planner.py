"""Plans in a thread of its own: a model may have to be fetched first, and the broker wants to hear of us meanwhile."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_runtime.errors import EdgeError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.planning.search import choose
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Cause
from edge_runtime.settings import Fleet

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """For which fleet, budget and highest rank (None: the fleet's) there is to be a plan. fill: the budget, to save time."""

    fleet: Fleet
    budget_bytes: int
    fill: bool
    most_rank: int | None


class Planned(NamedTuple):
    """The plan for what was wanted, with the facts of its model."""

    wanted: Wanted
    plan: Plan
    facts: Facts


class Unplanned(NamedTuple):
    """Why there is no plan."""

    error: EdgeError
    cause: Cause


def start(
    wanted: Wanted, models: Path, device: str, threads: int, put: Callable[[Planned | Unplanned], None]
) -> None:
    """Begin; put is called from the thread, once.

    Args:
        models: where relative paths of the catalog are looked for.
        device, threads: the trainer's.
    """

    def plan() -> None:
        cause: Cause = "model"  # of a failure in the stage that runs
        try:
            fleet, sources = wanted.fleet, {model.source for model in wanted.fleet.catalog}
            facts = {source: processes.prepared(source, models) for source in sources}
            cause = "machine"
            rates = processes.rates(device, threads)
            runtime_bytes = processes.runtime_bytes()
            if wanted.most_rank is not None:
                fleet = _in_ranks(fleet, wanted.most_rank)
            cause = "budget"
            fits = choose(fleet, facts, wanted.budget_bytes, runtime_bytes, rates, fill=wanted.fill).fits
            put(Planned(wanted, fits, facts[fits.source]))
        except EdgeError as error:
            put(Unplanned(error, cause))
        except Exception as error:  # whatever it is, the agent has to hear of it
            log.exception("planning failed")
            put(Unplanned(EdgeError(f"planning failed: {error}"), "internal"))

    threading.Thread(target=plan, name="plan", daemon=True).start()


def _in_ranks(fleet: Fleet, most: int) -> Fleet:
    """The fleet with its ranks cut to at most this."""
    rank, *lower = sorted(
        {min(one, most) for one in (fleet.adapter.rank, *fleet.adapter.lower)}, reverse=True
    )
    return msgspec.structs.replace(
        fleet, adapter=msgspec.structs.replace(fleet.adapter, rank=rank, lower=tuple(lower))
    )
