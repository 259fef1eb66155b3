"""Keeps a round within its memory budget: each step's peak decides the next step's plan."""

from collections.abc import Callable, Sequence

from edge_profiles import format_size

from edge_runtime.errors import MemoryShortError
from edge_runtime.protocol.plan import Plan

NEAR = 0.98  # share of the budget; rows differ in length, and a later step may take more


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
