"""Time and memory of merging one round on the node: updates of SmolLM2-135M, rank 16.

    make bench-merge ARGS="--updates 100"

Each method merges in a process of its own, from encoded files to the next global version. Memory is
the process's peak above what it had before; the updates are eight drawn ones, over and over.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from edge_broker import messages
from edge_broker.journal import Update
from rich.console import Console
from rich.table import Table

from edge_runtime import methods, settings
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.aggregator.merge import merge
from edge_runtime.demo import model as demo
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.protocol import codec
from edge_runtime.protocol.round import CODEC

DRAWN, CLASS, RANK, MIB = 8, "SmolLM2", 16, 1 << 20


class Taken(msgspec.Struct):
    """Of one merge; bytes of all its updates as encoded."""

    seconds: float
    peak_bytes: int
    update_bytes: int


def taken(facts: Facts, name: str, updates: int) -> Taken:
    """Merge one round in this process."""
    fleet, method = _fleet(name), methods.METHODS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = [_draw(facts, name, seed, folder) for seed in range(DRAWN)]
        made = [_update(files[number % DRAWN], number) for number in range(updates)]
        before, began = _peak_bytes(), time.perf_counter()
        merge(made, {}, fleet, method, 1, folder / "versions")
        seconds = time.perf_counter() - began
        sizes = sum(one.payload.stat().st_size for one in made)
    return Taken(seconds, _peak_bytes() - before, sizes)


def _fleet(name: str) -> settings.Fleet:
    return settings.Fleet(
        "bench",
        (settings.Model("m"),),
        rounds=6,
        method=settings.MethodChoice(name),
        adapter=settings.Adapter(rank=RANK),
    )


def _draw(facts: Facts, name: str, seed: int, folder: Path) -> Path:
    """An encoded update; a process of its own has drawn it, whose memory does not count."""
    path = folder / f"{seed}.edc"
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--draw",
        str(path),
        "--seed",
        str(seed),
        "--method",
        name,
    ]
    subprocess.run(command, input=msgspec.json.encode(facts), check=True, timeout=60)
    return path


def drawn(facts: Facts, name: str, seed: int) -> bytes:
    """An encoded update of this method: what it sends of a model, in random values."""
    method, draw = methods.METHODS[name], np.random.default_rng(seed)
    shapes = adapter_shapes(facts, tuple(range(facts.layers)), tuple(facts.linears), RANK, method)
    sent = {key: shape for key, shape in shapes.items() if method.factor(key).exchanged}
    delta = {key: draw.normal(0, 1e-3, shape).astype(np.float32) for key, shape in sent.items()}
    return codec.encode(delta, step=method.codec_step(_fleet(name)))


def _update(path: Path, number: int) -> Update:
    origin = messages.Origin(
        fleet="bench",
        device=f"device-{number}",
        round=1,
        model_class=CLASS,
        codec=CODEC,
        samples=100 + number,
    )
    return Update(messages.describe(path, origin, path.stat().st_size), path)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print the table; or, for its own processes, do one part of the work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument(
        "--method", help="Merge with this one here, and print JSON; facts are read from stdin."
    )
    parser.add_argument("--draw", type=Path, help="Write one update to this file instead.")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.method is not None:
        facts = msgspec.json.decode(sys.stdin.buffer.read(), type=Facts)
        if asked.draw is not None:
            asked.draw.write_bytes(drawn(facts, asked.method, asked.seed))
        else:
            sys.stdout.buffer.write(msgspec.json.encode(taken(facts, asked.method, asked.updates)))
        return
    facts = processes.prepared(str(demo.path()), Path.cwd())
    title = f"one round of {asked.updates} updates, {facts.model_class}, rank {RANK}"
    table = Table("method", "MB an update", "seconds", "peak above the start", title=title)
    for name, method in methods.METHODS.items():
        if not method.merges:
            continue
        command = [sys.executable, "-m", __spec__.name, "--method", name, "--updates", str(asked.updates)]
        done = subprocess.run(
            command, input=msgspec.json.encode(facts), check=True, capture_output=True, timeout=600
        )
        one = msgspec.json.decode(done.stdout, type=Taken)
        megabytes = one.update_bytes / asked.updates / 1e6
        table.add_row(name, f"{megabytes:.2f}", f"{one.seconds:.1f}", f"{one.peak_bytes / MIB:.0f} MiB")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
