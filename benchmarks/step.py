"""One training step beside PEFT's: SmolLM2-135M, 4 rows of 256 tokens, rank 16.

    make bench-step
    make bench-step ARGS="--weights q4_1"

Both train on the same rows in one process, a step each in turn, so that drift of the machine hits
both alike. PEFT has its weights in bfloat16; so have ours, unless another format is asked for.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import get_args

import torch
from edge_kernels import apply
from rich.console import Console
from rich.table import Table

from benchmarks.peft import trainer
from edge_runtime import settings
from edge_runtime.adapters import attach
from edge_runtime.demo import model as demo
from edge_runtime.methods import fedit
from edge_runtime.models import structure, weights
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.trainer import step
from edge_runtime.trainer.examples import Example

ROWS, TOKENS, STEPS, WARM_UP = 4, 256, 8, 2
SPEC = settings.Adapter(rank=16, alpha=32)
TRAINING = settings.Training(steps=STEPS + WARM_UP, rows_a_step=ROWS, learning_rate=1e-3)


def rows_of(facts: Facts) -> list[Example]:
    """Random tokens, all of them learned: the time of a step does not depend on what they say."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, facts.vocabulary, (ROWS, TOKENS), generator=draw)
    return [Example(row, row) for row in ids.tolist()]


def measured(facts: Facts, examples: list[Example], format: settings.Weights) -> dict[str, list[float]]:
    """Seconds of each warm step; PEFT makes one step between two of ours."""
    peft = trainer(facts, facts.layers, "bfloat16", SPEC, TRAINING, "cpu")
    model = weights.load(facts, facts.layers, format)
    adapter = attach.attach(model, tuple(range(facts.layers)), SPEC, fedit.METHOD, seed=0)
    apply(model, structure.modules(model))
    seconds: dict[str, list[float]] = {"PEFT": [], "Edge Runtime": []}
    round_settings = step.RoundSettings(TRAINING, [tuple(range(facts.layers))])
    learner = step.Learner(model, adapter, examples, round_settings)
    for number in range(TRAINING.steps):
        began = time.perf_counter()
        learner.step(ROWS)
        ended = time.perf_counter()
        peft(examples)
        if number >= WARM_UP:  # the first steps build kernels that later ones reuse
            seconds["Edge Runtime"].append(ended - began)
            seconds["PEFT"].append(time.perf_counter() - ended)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", choices=get_args(settings.Weights), default="bfloat16")
    format = parser.parse_args().weights
    facts = processes.prepared(str(demo.path()), Path.cwd())
    examples = rows_of(facts)
    seconds = measured(facts, examples, format)
    title = f"{facts.model_class}, {ROWS} x {TOKENS} tokens, {format}, {torch.get_num_threads()} threads"
    table = Table("", "s a step", "p20 to p80", "against PEFT", title=title)
    theirs = statistics.median(seconds["PEFT"])
    for name, taken in seconds.items():
        median, fifths = statistics.median(taken), statistics.quantiles(taken, n=5)
        table.add_row(name, f"{median:.2f}", f"{fifths[0]:.2f} to {fifths[-1]:.2f}", f"{median / theirs:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
