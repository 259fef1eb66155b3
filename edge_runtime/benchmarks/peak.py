"""Predicted beside measured peak memory of the trainer, on the demo's model and rows.

    make bench-peak

Each setting runs in a real trainer process for a few steps; runtime baseline, prediction, measurement and their ratio.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from edge_runtime import processes
from edge_runtime.demo import commands, model
from edge_runtime.models.facts import Facts
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.search import candidates
from edge_runtime.settings import Adapter, Fleet, Model, Training, Weights
from edge_runtime.training import data
from edge_runtime.training.job import Job, Result

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


def planned(depth: int, weights: Weights, rank: int, rows: int, tokens: int, facts: Facts) -> tuple[Fleet, Plan]:
    """A fleet of one model, and the plan of its largest micro-batch."""
    training = Training(steps=STEPS, rows_a_step=rows, max_tokens=tokens)
    catalog = (Model(source="model", depth=depth, weights=(weights,)),)
    fleet = Fleet(name="bench", catalog=catalog, adapter=Adapter(rank=rank), training=training)
    return fleet, next(candidates(fleet, {"model": facts}, processes.runtime_bytes()))[0]


def measure(facts: Facts, fleet: Fleet, plan: Plan, rows: commands.Rows) -> Result:
    """Run the plan in a trainer process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = Job(
            train=True,
            facts=facts,
            plan=plan,
            adapter=fleet.adapter,
            training=fleet.training,
            method="fedit",
            seed=0,
            round=1,
            rounds=1,
            data=str(data.write_rows(folder / "train.jsonl", rows.train)),
            evaluation={"own": str(data.write_rows(folder / "own.jsonl", rows.held_out))},
            depths=(plan.depth,),
        )
        (folder / "job.json").write_bytes(msgspec.json.encode(job))
        command = [sys.executable, "-m", "edge_runtime.training", str(folder)]
        subprocess.run(command, env=processes.environment(), stdout=subprocess.DEVNULL, check=True, timeout=600)
        return msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)


def main() -> None:
    """Print the table."""
    facts = processes.prepared(str(model.path()), Path.cwd())
    console = Console(width=100)
    title = f"{facts.model_class}, {TOKENS} tokens a row, runtime baseline {processes.runtime_bytes() / MIB:.0f} MiB"
    table = Table(*("layers", "weights", "rank", "rows", "predicted", "measured", "ratio", "s a step"), title=title)
    ratios = []
    drawn = commands.rows("kitchen", train=200, held_out=16, seed=0)
    for depth, weights, rank, rows in SETTINGS:
        fleet, plan = planned(depth, weights, rank, rows, TOKENS, facts)
        result = measure(facts, fleet, plan, drawn)
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
