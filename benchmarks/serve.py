"""What serving costs: tokens a second, peak memory and start, beside llama.cpp on the same GGUF file.

    make bench-serve
    make bench-serve ARGS="--tokens 64 --skip-swaps"

The model is the demo's, SmolLM2-135M-Instruct in q4_1. Each setting runs in a process of its own:
a prompt of 256 tokens, then the answer's, likeliest token by likeliest token. Settings run in turn,
several times, because other work on a machine hits all of them alike then; the best of each counts.
Adapters are random, on every linear layer.

    CPU     milliseconds of all threads for a token of the answer; with ARGS="--threads 1" no thread
            waits for another, so that the figure holds on a busy machine too
    wait    seconds from the process's start to the first token; the graph is in the cache
    swap    what a new version costs a server under load (serve_swaps.py)

Every result is a line of the file of results as soon as it is there.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.serve_swaps import CLIENTS, VERSIONS, adapter, swaps
from edge_runtime.demo import model as demo
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.serving.backends import load
from edge_runtime.settings import Backend, Weights
from edge_runtime.trainer.job import Machine

PROMPT = 256
LLAMA = "llama.cpp q4_1"


class Setting(NamedTuple):
    """What serves."""

    backend: Backend
    weights: Weights
    adapter: bool = False
    merged: bool = False  # the adapter is in the matrices, which are packed again


SETTINGS = {
    "onnx q4_1": Setting("onnx", "q4_1"),
    "onnx q4_1 + adapter": Setting("onnx", "q4_1", adapter=True),
    "onnx q4_1, merged": Setting("onnx", "q4_1", merged=True),
    "onnx q8_0": Setting("onnx", "q8_0"),
    "onnx q8_0 + adapter": Setting("onnx", "q8_0", adapter=True),
    "onnx float32": Setting("onnx", "float32"),
    "onnx float32 + adapter": Setting("onnx", "float32", adapter=True),
    "torch bfloat16": Setting("torch", "bfloat16"),
    "torch bfloat16 + adapter": Setting("torch", "bfloat16", adapter=True),
    "torch q4_1": Setting("torch", "q4_1"),
    "torch q4_1 + adapter": Setting("torch", "q4_1", adapter=True),
}


class Speed(msgspec.Struct):
    """What a setting reached."""

    setting: str
    prefill: float  # tokens a second
    decode: float
    cpu: float  # milliseconds a token of the answer
    wait: float  # seconds
    peak: float = 0.0  # MiB


# --- a setting, in a process of its own


def main_of_setting(setting: str, tokens: int, threads: int, merged: Path) -> None:
    """Measure a setting, and print its Speed as JSON."""
    prompt = np.random.default_rng(0).integers(100, 40000, PROMPT).tolist()
    if setting == LLAMA:
        speed = _llama(prompt, tokens, threads)
    else:
        source = merged if SETTINGS[setting].merged else demo.path()
        facts = processes.prepared(str(source), Path.cwd())
        speed = _engine(setting, facts, prompt, tokens, threads)
    speed.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(msgspec.json.encode(speed).decode() + "\n")


def _engine(name: str, facts: Facts, prompt: list[int], tokens: int, threads: int) -> Speed:
    setting = SETTINGS[name]
    learned = adapter(facts) if setting.adapter else None
    engine = load(setting.backend, facts, learned, setting.weights, Machine(threads, "cpu"))
    engine.begin().feed(prompt[:8])
    first, sequence = time.time(), engine.begin()
    began = time.perf_counter()
    logits = sequence.feed(prompt)
    filled, used = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        logits = sequence.feed([int(logits.argmax())])
    seconds, used = time.perf_counter() - filled, time.process_time() - used
    return Speed(name, PROMPT / (filled - began), tokens / seconds, used / tokens * 1e3, first)


def _llama(prompt: list[int], tokens: int, threads: int) -> Speed:
    """By llama.cpp's own clock."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(demo.path()), 1024, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)

    def complete(ids: list[int], count: int) -> tuple[Any, float]:
        used = time.process_time()
        request = {
            "prompt": ids,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        timings = server.handle_completions(request)["timings"]
        return timings, time.process_time() - used

    complete(prompt[:8], 1)
    first = time.time()
    (_, prefill), (timings, whole) = complete(prompt, 1), complete(prompt, tokens + 1)
    rates = (timings["prompt_per_second"], timings["predicted_per_second"])
    return Speed(LLAMA, *rates, (whole - prefill) / tokens * 1e3, first)


def main_of_merge(folder: Path) -> None:
    """Write the model with an adapter in its matrices as a checkpoint."""
    import torch

    from edge_runtime.models import structure, weights

    facts = processes.prepared(str(demo.path()), Path.cwd())
    model, learned = weights.load(facts, facts.layers, "float32"), adapter(facts)
    for layer, block in enumerate(structure.blocks(model)):
        for role, linear in structure.linears(block, structure.family(model)).items():
            A, B = map(torch.from_numpy, learned.factors[layer, role])
            linear.weight.data += B @ A
    model.save_pretrained(folder)
    for file in Path(facts.folder).glob("*token*"):
        shutil.copy(file, folder)


# --- all settings


def speeds(names: list[str], tokens: int, threads: int, repeats: int) -> Iterator[Speed]:
    """Each setting's speed, several times in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        if any(SETTINGS[name].merged for name in names if name != LLAMA):
            _process("merge", str(merged))
        for number in range(repeats + 1):
            for name in names:
                began = time.time()
                written = _process("setting", name, str(tokens), str(threads), str(merged))
                speed = msgspec.json.decode(written.splitlines()[-1], type=Speed)
                speed.wait -= began
                if number:  # the first time writes graphs and prepares models
                    yield speed


def _process(*arguments: str) -> bytes:
    command = [sys.executable, "-m", "benchmarks.serve", *arguments]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout


# --- the table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[LLAMA, *SETTINGS], help="settings; default: all")
    parser.add_argument("--skip-swaps", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("build/bench-serve.jsonl"))
    options, console = parser.parse_args(), Console(width=110)
    names = options.only or [LLAMA, *SETTINGS]
    if LLAMA in names and find_spec("xllamacpp") is None:
        console.print("llama.cpp is left out: pip install xllamacpp")
        names.remove(LLAMA)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[Speed]] = {}
    with options.results.open("ab") as results:

        def keep(result: msgspec.Struct) -> None:
            results.write(msgspec.json.encode(result) + b"\n")
            results.flush()

        for speed in speeds(names, options.tokens, options.threads, options.repeats):
            keep(speed)
            measured.setdefault(speed.setting, []).append(speed)
        console.print(_table(measured, options.threads))
        if not options.skip_swaps:
            done = swaps("onnx", "q4_1")
            keep(done)
            console.print(
                f"a swap takes {statistics.median(done.swap_s) * 1e3:.0f} ms; {VERSIONS} versions under load of "
                f"{CLIENTS} clients: {statistics.median(done.appear_s) * 1e3:.0f} ms from the folder to new requests, "
                f"{max(done.appear_s) * 1e3:.0f} ms at most; {done.answers} answers, {done.lost} lost"
            )


def _table(measured: dict[str, list[Speed]], threads: int) -> Table:
    """The best of each setting, and its ratio to llama.cpp's."""
    best = {name: _best(name, several) for name, several in measured.items()}
    columns = (
        "",
        "tokens/s",
        "ratio",
        "CPU, ms",
        "ratio",
        "prefill, tokens/s",
        "ratio",
        "peak, MiB",
        "wait, s",
    )
    title = f"prompt of {PROMPT} tokens, {threads} threads; ratios are to llama.cpp"
    table, other = Table(*columns, title=title), best.get(LLAMA)
    for name, speed in best.items():
        ratios = ["", "", ""]
        if other is not None:
            shares = (speed.decode / other.decode, other.cpu / speed.cpu, speed.prefill / other.prefill)
            ratios = [f"{share:.2f}" for share in shares]
        figures = (f"{speed.decode:.1f}", f"{speed.cpu:.1f}", f"{speed.prefill:.0f}")
        pairs = [text for pair in zip(figures, ratios, strict=True) for text in pair]
        table.add_row(name, *pairs, f"{speed.peak:.0f}", f"{speed.wait:.1f}")
    return table


def _best(name: str, several: list[Speed]) -> Speed:
    """The best of each figure."""
    prefill, decode = (max(getattr(speed, rate) for speed in several) for rate in ("prefill", "decode"))
    cost = (min(getattr(speed, field) for speed in several) for field in ("cpu", "wait", "peak"))
    return Speed(name, prefill, decode, *cost)


if __name__ == "__main__":
    if sys.argv[1:2] == ["setting"]:
        main_of_setting(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    elif sys.argv[1:2] == ["merge"]:
        main_of_merge(Path(sys.argv[2]))
    else:
        main()
