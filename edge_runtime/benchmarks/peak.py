"""Predicted beside measured peak memory of the trainer, on the demo's model and rows.

    make bench-peak

Each setting runs in a real trainer process for a few steps; runtime baseline, prediction, measurement and their ratio.
"""

import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge_runtime import processes
from edge_runtime.demo import commands, model
from edge_runtime.measure import planned, train
from edge_runtime.settings import Weights

MIB = 1 << 20
TOKENS = 40  # the longest of the rows
STEPS = 4
SETTINGS: list[tuple[int, Weights, int, int]] = [  # depth, weights, rank, rows
    (depth, weights, rank, rows)
    for depth in (10, 30)
    for weights in ("float32", "bfloat16")
    for rank in (4, 16)
    for rows in (2, 8)
]


def main() -> None:
    """Print the table."""
    facts = processes.prepared(str(model.path()), Path.cwd())
    console = Console(width=100)
    title = f"{facts.model_class}, {TOKENS} tokens a row, runtime baseline {processes.runtime_bytes() / MIB:.0f} MiB"
    table = Table(*("layers", "weights", "rank", "rows", "predicted", "measured", "ratio", "s a step"), title=title)
    ratios = []
    drawn = commands.rows("kitchen", train=200, held_out=16, seed=0)
    for depth, weights, rank, rows in SETTINGS:
        fleet, plan = planned(facts, depth, weights, rank, rows, TOKENS, STEPS)
        with tempfile.TemporaryDirectory() as folder:
            result = train(facts, fleet, plan, drawn.train, drawn.held_out, Path(folder))
        predicted, measured = plan.predicted_peak_bytes, result.measured_peak_bytes
        ratios.append(predicted / measured)
        sizes = (f"{predicted / MIB:.0f} MiB", f"{measured / MIB:.0f} MiB", f"{ratios[-1]:.3f}")
        table.add_row(str(depth), weights, str(rank), str(rows), *sizes, f"{result.seconds['train'] / STEPS:.2f}")
    console.print(table)
    console.print(
        f"predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
