"""The budget of each of the demo's devices, so that each trains another size of the model.

A size fits a budget that is at least its smallest predicted peak, whatever weight format reaches it. So a budget between
the smallest peaks of two neighbouring sizes fits the smaller one of them and no larger one. Budgets lie halfway.
"""

from edge_runtime.models.facts import Facts
from edge_runtime.planning.candidates import candidates
from edge_runtime.planning.time import Rates
from edge_runtime.settings import Fleet

DEVICES = ("kitchen", "garage", "garden")  # from the largest budget to the smallest


def budgets_bytes(fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int, rates: Rates) -> dict[str, int]:
    """Budgets by device.

    Args:
        fleet: its catalog has at least as many depths as there are devices, the largest first.
        facts: by source of the catalog.
        runtime_bytes: the runtime baseline of this machine, which every peak includes.
        rates: of this machine; budgets do not depend on them.
    """
    smallest: dict[int, int] = {}  # predicted peak by depth
    for plans in candidates(fleet, facts, runtime_bytes, rates):
        peak_bytes = min(plan.predicted_peak_bytes for plan in plans)
        smallest[plans[0].depth] = min(peak_bytes, smallest.get(plans[0].depth, peak_bytes))
    peaks = sorted(smallest.values(), reverse=True)
    # the largest size has as much room above it as the next one
    peaks = [2 * peaks[0] - peaks[1], *peaks]
    return {
        name: (above + peak_bytes) // 2
        for name, above, peak_bytes in zip(DEVICES, peaks, peaks[1:], strict=False)
    }
