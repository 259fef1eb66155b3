"""The plan of a device, made in a thread: fetching a model takes long, the broker needs answers."""

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from edge_runtime import methods
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.errors import EdgeError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.planning.graphs import graph, with_onnx
from edge_runtime.planning.predict import Serving
from edge_runtime.planning.search import choose
from edge_runtime.planning.serving import require_servable
from edge_runtime.planning.time import Rates
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Cause
from edge_runtime.settings import Fleet

log = logging.getLogger(__name__)
# Share of the predicted bytes above the runtime, for the plan after one that was short of memory.
SMALLER = 0.8


class Request(NamedTuple):
    """All that a plan depends on, besides the device itself."""

    fleet: Fleet
    budget_bytes: int
    fill: bool  # spend what is left of the budget on faster steps
    rank_limit: int | None  # highest rank; None: the fleet's


class Planned(NamedTuple):
    """The plan that answers a request, with the facts of its model."""

    request: Request
    plan: Plan
    facts: Facts
    server: str = ""  # a sentence on the server's backend, if there is a server


class Unplanned(NamedTuple):
    """Why no plan answers a request."""

    error: EdgeError
    cause: Cause


class Planner:
    """Keeps a plan until the fleet, the budget or the rank changes; used from one thread."""

    def __init__(
        self,
        budget_bytes: int,  # peak that a trainer may reach, together with a server
        find: Callable[[Request], Planned | Unplanned],  # answers a request; called in a thread
        put: Callable[[Planned | Unplanned], None],  # takes the answer there, to be handed to `take`
    ) -> None:
        """Nothing is planned yet."""
        self.latest: Planned | None = None
        self._budget_bytes, self._fill = budget_bytes, True
        self._find, self._put = find, put
        self._running = False

    def plan(self, fleet: Fleet, rank_limit: int | None) -> Planned | None:
        """The plan for a fleet; None: a thread plans, and `put` will get its answer."""
        request = Request(fleet, self._budget_bytes, self._fill, rank_limit)
        if self.latest is not None and self.latest.request == request:
            return self.latest
        # Else an earlier request's answer comes first. Where it does not serve, the caller asks again.
        if not self._running:
            self._running = True
            threading.Thread(target=lambda: self._put(self._find(request)), name="plan", daemon=True).start()
        return None

    def take(self, answer: Planned | Unplanned) -> None:
        """Take in the answer of the thread."""
        self._running = False
        if isinstance(answer, Planned):
            self.latest = answer

    def shrink(self, plan: Plan, *, killed: bool) -> None:
        """Ask for less memory from now on: a trainer was short of it with this plan.

        A trainer that ended itself has tried to go on without what only saves time. A killed one
        has not: its next plan leaves that out, and keeps the budget.
        """
        self._fill = False
        if killed and plan.kept_blocks:
            return
        runtime = plan.terms["runtime"]
        above = plan.predicted_peak_bytes - plan.terms.get("activations", 0) - runtime
        trainer_bytes = int(runtime + SMALLER * above)
        self._budget_bytes = min(self._budget_bytes, trainer_bytes + plan.serving_bytes)


def find_plan(request: Request, options: DeviceOptions) -> Planned | Unplanned:
    """Fetch the catalog's models, measure the device the first time, and choose the best plan."""
    cause: Cause = "input"  # of a failure in the stage that runs
    try:
        if options.serve is not None or options.on_version is not None:
            require_servable(methods.of(request.fleet))
        cause = "model"
        facts = processes.catalog_facts(request.fleet, options.models)
        cause = "machine"
        rates = processes.rates(options.device, options.threads)
        runtime_bytes = processes.runtime_bytes()
        cause = "budget"
        serving = None if options.serve is None else with_onnx(options.serve.size, facts, options.device)
        return _planned(request, facts, runtime_bytes, rates, serving)
    except EdgeError as error:
        return Unplanned(error, cause)
    except Exception as error:
        # the agent waits for an answer, whatever went wrong
        log.exception("planning failed")
        return Unplanned(EdgeError(f"planning failed: {error}"), "internal")


def _planned(
    request: Request, facts: dict[str, Facts], runtime_bytes: int, rates: Rates, serving: Serving | None
) -> Planned:
    """The best plan; where the graph for its server cannot be written, the best without that graph."""
    fleet = _in_ranks(request.fleet, request.rank_limit)
    choice = choose(
        fleet, facts, request.budget_bytes, runtime_bytes, rates, serving=serving, fill=request.fill
    )
    plan, model = choice.fits, facts[choice.fits.source]
    if serving is not None and plan.server == "onnx":
        try:
            graph(model, plan.depth, plan.weights)
        except (EdgeError, OSError) as error:
            unserved = {**serving.unserved, model.model_class: str(error)}
            return _planned(request, facts, runtime_bytes, rates, serving._replace(unserved=unserved))
    return Planned(request, plan, model, choice.server)


def _in_ranks(fleet: Fleet, limit: int | None) -> Fleet:
    """The fleet with no rank above the limit."""
    if limit is None:
        return fleet
    ranks = {min(rank, limit) for rank in (fleet.adapter.rank, *fleet.adapter.lower)}
    highest, *lower = sorted(ranks, reverse=True)
    adapter = msgspec.structs.replace(fleet.adapter, rank=highest, lower=tuple(lower))
    return msgspec.structs.replace(fleet, adapter=adapter)
