"""HeteroTune's claims of communication and memory, on Llama-3.2-1B's shape with random weights.

    make bench-claims

Bytes: one update of each method as it is encoded, beside the model in 16 bits. Memory: the
trainer's peak with `fedit`, whose adapter is 0.2 % smaller, above the runtime's own, beside PEFT's
LoRA and beside the training of all parameters, both with AdamW and gradient checkpointing in
bfloat16 and each in a process of its own on the same rows. The third claim, accuracy, is the
studies'. Source of the claims: arXiv 2411.16796, abstract: 99.5 % less communication, 50 % less
memory at the peak.
"""

import argparse
import math
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.merge import RANK, drawn
from edge_runtime.agent import measure
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.protocol import codec
from edge_runtime.settings import Weights

MIB = 1 << 20
SHAPE = Path(__file__).parent / "shapes" / "llama-3.2-1b"
TOKENS = 512
METHODS = ("fedit", "heterotune", "fedadapter", "h2tune")
FORMATS: tuple[Weights, ...] = ("bfloat16", "q4_1")
LESS_SENT, LESS_MEMORY = 0.995, 0.5  # the claims


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    facts = processes.prepared(str(SHAPE), Path.cwd(), random_weights=True)
    console = Console(width=120)
    console.print(_bytes(facts))
    console.print(_memory(facts, options.steps))


def _bytes(facts: Facts) -> Table:
    model = 2 * (facts.layers * facts.block_parameters + facts.head_parameters)
    table = Table(
        "method",
        "values",
        "encoded",
        "of the model",
        "less",
        "claimed",
        title="One update, rank 16 on all linears",
    )
    for name in METHODS:
        update = drawn(facts, name, 0)
        values = sum(map(math.prod, codec.shapes(update).values()))
        share = len(update) / model
        table.add_row(
            name,
            f"{values / 1e6:.2f} M",
            f"{len(update) / MIB:.2f} MiB",
            f"{share:.3%}",
            f"{1 - share:.2%}",
            f"{LESS_SENT:.1%}",
        )
    table.add_row("the model", "", f"{model / MIB:.0f} MiB", "100 %")
    return table


def _memory(facts: Facts, steps: int) -> Table:
    title = f"Peak above the runtime's own, 1 x {TOKENS} tokens"
    table = Table("", "peak", "seconds a step", "less than all", "than LoRA", "claimed", title=title)
    ours: dict[str, measure.Taken] = {}
    others: dict[str, measure.Taken] = {}
    for weights in FORMATS:
        fleet, plan = measure.planned(facts, facts.layers, measure.Trial(weights, RANK, 1, TOKENS, steps))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            result = measure.train(facts, fleet, plan, measure.texts(steps, TOKENS), [], folder)
            ours[f"Edge Runtime, {weights}"] = measure.taken(result)
            if not others:
                others = {
                    "PEFT LoRA": measure.beside(folder),
                    "all parameters": measure.beside(folder, "--full"),
                }
    lora, every = (_above(one) for one in others.values())
    for name, one in {**ours, **others}.items():
        less = [f"{1 - _above(one) / other:.1%}" for other in (every, lora)] if name in ours else ["", ""]
        claimed = f"{LESS_MEMORY:.0%}" if name in ours else ""
        table.add_row(name, f"{_above(one) / MIB:.0f} MiB", f"{one.step_seconds:.1f}", *less, claimed)
    return table


def _above(one: measure.Taken) -> int:
    return one.measured_peak_bytes - one.baseline_bytes


if __name__ == "__main__":
    main()
