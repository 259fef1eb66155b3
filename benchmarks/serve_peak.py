"""Predicted beside measured peak memory of a server, over models, backends, formats and contexts.

    make bench-serve-peak
    make bench-serve-peak ARGS="--gemma FILE --backend onnx"

Each setting is a real `edge-runtime serve`: two answers fill the whole context at once, twice, and a
new version of an adapter of rank 16 comes meanwhile; rank 0 is the base alone. The models are
SmolLM2-135M and, with its GGUF file, Gemma-3-270M, whose vocabulary is large. Every figure is printed
as soon as it is there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.memory import MIB, SMOLLM2
from benchmarks.serve_swaps import RANK, adapter
from edge_runtime import settings
from edge_runtime.adapters import learned
from edge_runtime.models.facts import Facts
from edge_runtime.planning import graphs, processes
from edge_runtime.planning.predict import Serving, Workload
from edge_runtime.planning.serving import serving_bytes
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Backend, Weights

FORMATS: tuple[Weights, ...] = ("float32", "q8_0", "q4_1")
CONTEXTS, PARALLEL, ANSWER = (512, 4096), 2, 8
RUNS = 2  # full contexts, in each of which a new version comes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_peak")
    parser.add_argument("--gemma", type=Path, help="Gemma-3-270M's GGUF file")
    parser.add_argument("--backend", nargs="+", choices=["onnx", "torch"], default=["onnx", "torch"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    options, console, ratios = parser.parse_args(), Console(width=110), []
    columns = ("model", "served by", "weights", "context", "rank", "predicted", "measured", "ratio")
    table = Table(*columns, title="peak of a server, MiB")
    sources = [SMOLLM2, *([options.gemma] if options.gemma else [])]
    settings_ = product(sources, options.backend, options.formats, CONTEXTS, (RANK, 0))
    for source, backend, weights, context, rank in settings_:
        facts = processes.prepared(str(source), Path.cwd())
        predicted = _predicted(facts, backend, weights, context, rank)
        measured = _measured(facts, backend, weights, context, rank)
        ratios.append(predicted / measured)
        sizes = (f"{predicted / MIB:.0f}", f"{measured / MIB:.0f}", f"{ratios[-1]:.3f}")
        row = (source.name.partition(".")[0], backend, weights, str(context), str(rank), *sizes)
        table.add_row(*row)
        console.print(*row, highlight=False)
    console.print(table)
    console.print(
        f"{len(ratios)} settings, predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}, "
        f"median {statistics.median(ratios):.3f}"
    )


def _predicted(facts: Facts, backend: Backend, weights: Weights, context: int, rank: int) -> int:
    fleet = settings.parse({"fleet": {"name": "f"}, "catalog": [{"source": "m"}]})
    serving = Serving(context, PARALLEL, processes.onnx_bytes())
    workload = Workload(fleet, facts, processes.runtime_bytes(), serving)
    layers = facts.layers
    plan = Plan("m", facts.model_class, layers, layers, weights, rank, 1, 64, {}, 0.0, server=backend)
    return serving_bytes(workload, plan)


def _measured(facts: Facts, backend: Backend, weights: Weights, context: int, rank: int) -> int:
    """Peak resident bytes of a server that has answered."""
    if backend == "onnx":
        graphs.graph(facts, facts.layers, weights)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        if rank:
            learned.write(adapter(facts), folder)
        command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--backend", backend]
        command += ["--model", facts.weights, "--weights", weights, "--context", str(context)]
        command += ["--threads", "1", "--parallel", str(PARALLEL), "--port", "0", "--attended", "--json"]
        command += ["--adapter", str(folder)] if rank else []
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=processes.environment(),
        )
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["text"].split(" at ")[1]
        for number in range(RUNS):
            clients = [threading.Thread(target=_ask, args=(url, context)) for _ in range(PARALLEL)]
            for client in clients:
                client.start()
            if rank:
                learned.write(adapter(facts, number + 2), folder)
                server.stdout.readline()
            for client in clients:
                client.join()
        status = Path(f"/proc/{server.pid}/status").read_text()
        server.communicate()  # the end of its input ends the server
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def _ask(url: str, context: int) -> None:
    body = json.dumps({"prompt": [50] * (context - ANSWER), "max_tokens": ANSWER}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        json.load(answer)


if __name__ == "__main__":
    main()
