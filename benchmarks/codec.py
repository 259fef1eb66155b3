"""What the codec makes of real deltas: bits a value beside their entropy, what rounding leaves over, MB/s.

    make bench-codec DATA=folder            with clinc150 in it, as studies read it
    make bench-codec DATA=folder ARGS="--steps 40"

A device of the study two-models trains a round: SmolLM2-135M cut to eight layers, and a head over
150 labels. Its delta is encoded with several [codec] steps. Entropy is that of each tensor's whole
numbers one by one. MB/s are of float32, on one thread, the best of five. What a step costs in accuracy
is the matter of the study studies/codec.toml.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from edge_runtime.agent import local_round
from edge_runtime.demo import model as demo
from edge_runtime.protocol import codec
from edge_runtime.settings import FINE_STEP
from edge_runtime.simulation import spec as specs
from edge_runtime.simulation.participants import participants
from edge_runtime.simulation.run import BASES
from edge_runtime.trainer.run import run

STUDY = Path(__file__).parents[1] / "studies" / "two-models.toml"
STEPS = (0.016, FINE_STEP, 0.5, 1.1, 1.5, 1.6, 2.5)  # 8, 7, 3, 2, 1.6, 1.5 and 1 bits


def trained(files: Path, steps: int) -> codec.Tensors:
    """The delta of a round before it is rounded."""
    study = specs.load(STUDY)
    arm = next(arm for arm in study.arm if arm.name == "fedit")
    study = msgspec.structs.replace(
        study, device=study.device[:1], training={**study.training, "steps": steps}
    )
    with tempfile.TemporaryDirectory() as scratch:
        fleet = study.fleet_of(arm, 0)
        (device,) = participants(study, arm, fleet, files, demo.path().parent, Path(scratch))
        job = device.rounds.job(1, fleet, device.facts, device.plan, local_round.Start())
        job = msgspec.structs.replace(job, evaluation={})
        folder = device.rounds.folder(job)
        local_round.write_job(folder, job)
        run(folder, BASES, lambda _: None)
        sent, left = codec.decode((folder / "payload.bin").read_bytes()), load_file(folder / "residual.bin")
    return {key: value + left[key] for key, value in sent.items()}


def entropy_bits(delta: codec.Tensors, step: float) -> float:
    """Of all values, each tensor with frequencies of its own."""
    bits = 0.0
    for value in delta.values():
        size = step * np.sqrt(np.square(value, dtype=np.float64).mean())
        _, counts = np.unique(np.rint(value / size), return_counts=True)
        bits -= float((counts * np.log2(counts / value.size)).sum())
    return bits


def best_seconds(work: Callable[[], Any]) -> float:
    """The shortest of five times."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def row(delta: codec.Tensors, step: float) -> tuple[str, ...]:
    """A line of the table."""
    values = sum(value.size for value in delta.values())
    payload = codec.encode(delta, step=step)
    decoded = codec.decode(payload)
    left = sum(np.square(value - decoded[key]).sum(dtype=float) for key, value in delta.items())
    energy = sum(np.square(value).sum(dtype=float) for value in delta.values())
    speeds = [
        4e-6 * values / best_seconds(work)
        for work in (lambda: codec.encode(delta, step=step), lambda: codec.decode(payload))
    ]
    bits = 8 * len(payload) / values, entropy_bits(delta, step) / values
    return (
        f"{step:g}",
        *(f"{each:.2f}" for each in bits),
        f"{left / energy:.2%}",
        *(f"{mb:.0f}" for mb in speeds),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec")
    parser.add_argument("--data", type=Path, default=Path("data"), help="Folder of the data sets.")
    parser.add_argument("--steps", type=int, default=20, help="Optimiser steps before the delta is taken.")
    asked = parser.parse_args()
    delta = trained(asked.data, asked.steps)
    title = f"one delta: {len(delta)} tensors, {sum(value.size for value in delta.values()):,} values"
    table = Table("step", "bits a value", "entropy", "left over", "encode, MB/s", "decode, MB/s", title=title)
    for step in STEPS:
        table.add_row(*row(delta, step))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
