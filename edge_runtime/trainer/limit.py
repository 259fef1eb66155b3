"""Keeps a running round within its budget: what a step took decides how the next one goes."""

from collections.abc import Callable, Sequence

from edge_profiles import format_size

from edge_runtime.errors import MemoryShortError
from edge_runtime.protocol.plan import Plan

NEAR = 0.98  # of the budget; rows differ in length, and a later step may take more


class Limit:
    """Asked after each step."""

    def __init__(self, budget_bytes: int, plan: Plan, lower: Sequence[Plan], lap: Callable[[], int]) -> None:
        """lower: plans to go on with, each in less memory than the one before. lap: peak bytes since it was last called."""
        self._budget_bytes, self._plan, self._lower, self._lap = (budget_bytes, plan, list(lower), lap)

    def ease(self) -> Plan | None:
        """The plan to go on with; None: the same.

        It is the first that is predicted to take enough less, and while the budget holds the last where none does.

        Raises:
            MemoryShortError: the step took more than the budget, and no plan here takes enough less.
        """
        peak = self._lap()
        if peak <= NEAR * self._budget_bytes:
            return None
        wanted = self._plan.predicted_peak_bytes - (peak - NEAR * self._budget_bytes)
        enough = [plan for plan in self._lower if plan.predicted_peak_bytes <= wanted]
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
