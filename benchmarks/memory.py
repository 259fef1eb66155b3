"""Memory and time of fine-tuning beside PEFT's and beside goals: SmolLM2-135M and Gemma-3-270M.

    make bench-memory

Each line is the real trainer in a process of its own, and PEFT in another on the same rows:
bfloat16, AdamW, gradient checkpointing. Peaks are above the runtime's own baseline; rank 16 on all
linear layers. Where the goal for memory leaves room, as many blocks run once as fit.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from edge_runtime.agent.measure import Measurement, Taken, Trial, measure
from edge_runtime.demo import model
from edge_runtime.planning import processes
from edge_runtime.settings import Boundaries, Weights
from edge_runtime.trainer.job import Machine

MIB = 1 << 20
SHAPES = Path(__file__).parent / "shapes"
BASELINE_GOAL, LOAD_GOAL_S = 300 * MIB, 4.0


class Case(NamedTuple):
    """One line of the table; None where there is no goal."""

    source: Path
    random_weights: bool
    rows: int
    tokens: int
    weights: Weights
    boundaries: Boundaries = "input"
    streamed: bool = False
    kept_blocks: int = 0
    goal_bytes: int | None = None  # above the baseline
    goal_time: float | None = None  # share of PEFT's


SMOLLM2, GEMMA = model.path(), SHAPES / "gemma-3-270m"
CASES = (
    Case(SMOLLM2, False, 4, 256, "bfloat16", goal_time=0.8),
    Case(SMOLLM2, False, 4, 256, "q4_1", goal_bytes=250 * MIB, goal_time=0.8),
    Case(SMOLLM2, False, 1, 256, "q4_1", "int8", True, goal_bytes=120 * MIB),
    Case(GEMMA, True, 1, 512, "bfloat16"),
    Case(GEMMA, True, 1, 512, "q4_1", kept_blocks=6, goal_bytes=450 * MIB, goal_time=1.0),
)


def main() -> None:
    """Print the table; with --json write every measurement too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    baseline = processes.runtime_bytes()
    table = Table(title="peak above the runtime's own, and time a step", title_justify="left")
    for column in (
        "model",
        "rows x tokens",
        "weights",
        "peak",
        "goal",
        "predicted",
        "s a step",
        "PEFT",
        "of PEFT",
        "goal",
    ):
        table.add_column(column, justify="right" if column not in ("model", "weights") else "left")
    taken: list[Measurement] = []
    pefts: dict[tuple[object, ...], Taken] = {}
    for case in CASES:
        same = case[:4]
        done = measure(
            str(case.source),
            Path.cwd(),
            Trial(
                weights=case.weights,
                rank=16,
                rows=case.rows,
                tokens=case.tokens,
                steps=options.steps,
                boundaries=case.boundaries,
                streamed=case.streamed,
                kept_blocks=case.kept_blocks,
            ),
            peft=same not in pefts,
            random_weights=case.random_weights,
            machine=Machine(),
        )
        peft = pefts.setdefault(same, done.peft) if done.peft else pefts[same]
        taken.append(msgspec.structs.replace(done, peft=peft))
        table.add_row(*_cells(case, done, peft, baseline))
    console = Console(width=140)
    console.print(table)
    loading = taken[1].load_seconds
    console.print(
        f"runtime baseline {baseline / MIB:.0f} MiB (goal {BASELINE_GOAL / MIB:.0f}); SmolLM2 from its GGUF to ready to train "
        f"{loading:.1f} s (goal {LOAD_GOAL_S:.0f})",
        highlight=False,
    )
    if options.json:
        named = [
            {**case._asdict(), "source": case.source.name, **msgspec.to_builtins(one)}
            for case, one in zip(CASES, taken, strict=True)
        ]
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(named), indent=2) + b"\n")


def _cells(case: Case, done: Measurement, peft: Taken, baseline: int) -> tuple[str, ...]:
    weights = case.weights + (", streamed" if case.streamed else "")
    weights += ", 8-bit boundaries" if case.boundaries == "int8" else ""
    weights += f", {case.kept_blocks} blocks run once" if case.kept_blocks else ""
    return (
        case.source.name.partition(".")[0],
        f"{case.rows} x {case.tokens}",
        weights,
        f"{(done.measured_peak_bytes - baseline) / MIB:.0f} MiB",
        f"{case.goal_bytes / MIB:.0f} MiB" if case.goal_bytes else "",
        f"{(done.predicted_peak_bytes - baseline) / MIB:.0f} MiB",
        f"{done.step_seconds:.2f}",
        f"{(peft.measured_peak_bytes - baseline) / MIB:.0f} MiB, {peft.step_seconds:.2f} s",
        f"{done.step_seconds / peft.step_seconds:.2f}",
        f"{case.goal_time}" if case.goal_time else "",
    )


if __name__ == "__main__":
    main()
