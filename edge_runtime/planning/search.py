"""Picks the plan that a device trains with.

The first model of the catalog that fits the budget; then the most precise weights, the longest
sequence, the highest rank, and last the largest micro-batch. Where the fleet has a deadline for a
step, only plans that are predicted to be in time. Memory that is left over then saves time: blocks
whose activations fit are kept whole, and do not run again in backward.
"""

from operator import attrgetter
from typing import NamedTuple

import msgspec
from edge_profiles import format_size

from edge_runtime.errors import BudgetError
from edge_runtime.models.facts import Facts
from edge_runtime.planning.candidates import candidates, predicted
from edge_runtime.planning.predict import Serving, Workload
from edge_runtime.planning.serving import why
from edge_runtime.planning.time import Rates
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Fleet

# Share of the budget that kept blocks may fill: a prediction can be wrong by a twentieth.
FULL = 0.95
_bytes, _seconds = attrgetter("needed_bytes"), attrgetter("step_seconds")


class Choice(NamedTuple):
    """The plan that fits, and plans that were preferred but are too large or too slow."""

    fits: Plan
    # Of each model and format before the winner's: the fastest plan that is small enough, else the
    # smallest plan.
    rejected: list[Plan]
    # The plan right before the winner; None: the winner is the first of its model.
    better: Plan | None
    server: str = ""  # a sentence on the server's backend, if there is a server


def choose(
    fleet: Fleet,
    facts: dict[str, Facts],
    budget_bytes: int,
    runtime_bytes: int,
    rates: Rates,
    *,
    serving: Serving | None = None,
    fill: bool = True,
) -> Choice:
    """The best plan within a budget, and within the fleet's deadline for a step if it has one.

    Args:
        fleet: its catalog is in order of preference.
        facts: of each source in the catalog.
        budget_bytes: peak that the trainer process may reach, the runtime included; with a server
            beside it, the peak of both.
        runtime_bytes: the measured baseline of this device.
        rates: measured on this device.
        serving: what a server beside the trainer may be asked; None: there is none.
        fill: keep blocks whole with memory that is left over.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would do, or the shortest step
            that is possible.
        InputError: a model does not have the depth, or all lengths are too long for it.
    """
    rejected: list[Plan] = []
    enumerated: list[Plan] = []
    small: list[Plan] = []  # within the budget, but too slow
    previous: Plan | None = None
    deadline_s = fleet.training.step_deadline_s
    workloads = {source: Workload(fleet, model, runtime_bytes, serving) for source, model in facts.items()}
    for plans in candidates(fleet, facts, runtime_bytes, rates, serving):
        enumerated.extend(plans)
        too_slow: list[Plan] = []
        for plan in plans:
            if plan.needed_bytes <= budget_bytes:
                filled = _filled(workloads[plan.source], rates, plan, budget_bytes) if fill else plan
                if over_deadline_s(filled, deadline_s) == 0:
                    same = previous and (previous.source, previous.depth) == (plan.source, plan.depth)
                    return Choice(
                        filled, rejected, previous if same else None, why(workloads[plan.source], filled)
                    )
                too_slow.append(filled)
            previous = plan
        rejected.append(min(too_slow, key=_seconds) if too_slow else min(plans, key=_bytes))
        small += too_slow
    raise BudgetError(_why_none(enumerated, small, budget_bytes, deadline_s))


def over_deadline_s(plan: Plan, deadline_s: float | None) -> float:
    """Seconds that a step is predicted to take beyond the deadline; 0: in time."""
    return 0.0 if deadline_s is None else max(0.0, plan.step_seconds - deadline_s)


def _filled(workload: Workload, rates: Rates, plan: Plan, budget_bytes: int) -> Plan:
    """The plan with as many kept blocks as there is memory for."""
    # from the most blocks down: the first that fits is the fastest
    for kept_blocks in range(0 if plan.streamed else plan.depth, 0, -1):
        faster = predicted(workload, rates, msgspec.structs.replace(plan, kept_blocks=kept_blocks))
        if faster.needed_bytes <= FULL * budget_bytes:
            return faster
    return plan


def _why_none(enumerated: list[Plan], small: list[Plan], budget_bytes: int, deadline_s: float | None) -> str:
    """The sentence of a BudgetError; `small` are the plans within the budget."""
    in_time = [plan for plan in enumerated if over_deadline_s(plan, deadline_s) == 0]
    if small or not in_time:
        fastest = min(small or enumerated, key=_seconds)
        within = f" in a budget of {format_size(budget_bytes)}" if small else ""
        return (
            f"no model of the catalog makes a step within {deadline_s:g} s{within}; the fastest would be {_named(fastest)}, "
            f"which takes {fastest.step_seconds:.3g} s; raise [training] step_deadline_s, or add a smaller model"
        )
    least = min(in_time, key=_bytes)
    too_slow = "" if len(in_time) == len(enumerated) else f" and makes a step within {deadline_s:g} s"
    return (
        f"a budget of {format_size(budget_bytes)} is too small for every model of the catalog; the smallest that would fit"
        f"{too_slow} is {_named(least)}, which needs {format_size(least.needed_bytes)}{_to_serve(least)}; "
        "raise --budget, or add a smaller model or a lower rank to the fleet file"
    )


def _to_serve(plan: Plan) -> str:
    if not plan.serving_bytes:
        return ""
    return (
        f": {format_size(plan.predicted_peak_bytes)} to train and {format_size(plan.serving_bytes)} to serve; a "
        "smaller --context needs less, and so does an agent without --serve"
    )


def _named(plan: Plan) -> str:
    model = f"{plan.source} with {plan.depth} layers in {plan.weights}"
    return f"{model}, rank {plan.rank} and {plan.tokens} tokens"
