"""Predicted beside measured peak memory of the trainer, over models, formats, ranks and lengths.

    make bench-peak
    make bench-peak ARGS=--across

Each setting runs in a real trainer process for a few steps. SmolLM2-135M's steps have 4 rows, those
of Gemma-3-270M's shape, whose weights are drawn at random, one; with ARGS="--gemma FILE", its GGUF
file, the model itself, whose tokenizer is large. With --across, fleets whose models learn from each
other (peak_across.py).
"""

import argparse
import statistics
from itertools import product
from pathlib import Path

import click

from benchmarks import peak_across
from benchmarks.memory import GEMMA, MIB, SMOLLM2
from edge_runtime.agent.measure import Trial, measure
from edge_runtime.planning import processes
from edge_runtime.settings import Weights
from edge_runtime.trainer.job import Machine

FORMATS: tuple[Weights, ...] = ("bfloat16", "q8_0", "q4_1")
RANKS = (16, 4)


def main() -> None:
    """Print each setting as it is measured, then the range of their ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gemma", type=Path, default=GEMMA)
    parser.add_argument("--across", action="store_true")
    options = parser.parse_args()
    if options.across:
        peak_across.show(SMOLLM2)
        return
    steps, gemma = options.steps, options.gemma
    click.echo(f"runtime baseline {processes.runtime_bytes() / MIB:.0f} MiB, {steps} steps")
    _show("model", "rows x tokens", "weights", "rank", "predicted", "measured", "ratio")
    ratios = []
    for (source, rows, lengths), weights, rank in product(
        ((SMOLLM2, 4, (256, 64)), (gemma, 1, (512, 128))), FORMATS, RANKS
    ):
        for tokens in lengths:
            done = measure(
                str(source),
                Path.cwd(),
                Trial(weights, rank, rows, tokens, steps),
                peft=False,
                random_weights=source == GEMMA,
                machine=Machine(),
            )
            predicted, measured = done.predicted_peak_bytes, done.measured_peak_bytes
            ratios.append(predicted / measured)
            sizes = (f"{predicted / MIB:.0f} MiB", f"{measured / MIB:.0f} MiB", f"{ratios[-1]:.3f}")
            _show(source.name.partition(".")[0], f"{rows} x {tokens}", weights, str(rank), *sizes)
    click.echo(
        f"{len(ratios)} settings, predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}, "
        f"median {statistics.median(ratios):.3f}"
    )


def _show(model: str, rows: str, *columns: str) -> None:
    click.echo(f"{model:28}{rows:15}" + "".join(f"{column:10}" for column in columns))


if __name__ == "__main__":
    main()
