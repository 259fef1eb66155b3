"""The command `python -m benchmarks.kernels`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.kernels import cases, measure
from benchmarks.kernels.cases import OPERATORS
from benchmarks.kernels.cases.case import OURS, SHAPES, SMALL, Case
from benchmarks.kernels.measure import OUT_OF_MEMORY, Rates, Result
from benchmarks.kernels.picture import picture, save
from benchmarks.kernels.report import described, heading, label, slug, tables, write

FOLDER = Path("benchmarks/results/kernels")
TOKENS, QUICK_TOKENS = [32, 64, 128, 256, 512, 1024, 2048, 4096], [32, 256, 1024]
CPU_SHAPES, CPU_TOKENS = SHAPES[:1], TOKENS[:6]
LONGEST_S = 0.5  # floor of the slowest case that a CPU still runs
LEFT_OUT = "left out: "
FILE = click.Path(path_type=Path, dir_okay=False, writable=True)
NAMES, DEVICES = click.Choice(list(OPERATORS)), click.Choice(["cpu", "cuda"])


@click.command()
@click.option("--json", "file", type=FILE, help=f"The file of results; default: {FOLDER}/MACHINE.jsonl.")
@click.option("--picture", "image", type=FILE, help="Also draw time against tokens, as .svg or .png.")
@click.option("--quick", is_flag=True, help="A small model's shape alone, at three numbers of tokens.")
@click.option("--only", type=NAMES, multiple=True, help="This operator; may be given again.")
@click.option("--device", "kind", type=DEVICES, help="Default: the GPU where there is one.")
def bench(
    file: Path | None, image: Path | None, quick: bool, only: tuple[str, ...], kind: str | None
) -> None:
    """Measure the operators beside plain torch, torch.compile, PEFT, Liger and bitsandbytes.

    All in one run, in turns: time, peak memory, and the time of the shapes at this machine's best.
    Rivals that are not installed are left out. On a CPU: the smallest of the models' shapes, up to
    1024 tokens.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "--device cuda needs a GPU that torch can use, and it sees none; try --device cpu"
        )
    device = torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    shapes, tokens = (SHAPES, TOKENS) if gpu else (CPU_SHAPES, CPU_TOKENS)
    shapes, tokens = ([SMALL], QUICK_TOKENS) if quick else (shapes, tokens)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    report = described(device)
    machine = measure.rates(device)
    report["rates"] = asdict(machine)
    name = "-".join([slug(report["machine"]), *["quick"] * quick, *map(slug, only)])
    file = file or FOLDER / f"{name}.jsonl"
    console.print(*heading(report), sep="\n")
    if not quick and not gpu:
        absent = ", ".join(shape.name for shape in SHAPES if shape not in shapes)
        console.print(f"left out on a CPU: {absent}; over {tokens[-1]} tokens")
    results = _measured(list(cases.select(shapes, tokens, only or None)), device, machine, (file, report))
    if not gpu:
        # far above the number of threads: other processes took part, and distort the times
        report["load_after"] = os.getloadavg()[0]
        console.print(f"load {report['load']:.1f} before, {report['load_after']:.1f} after")
        write(file, report, results)
    console.print(*tables(report, results)[len(heading(report)) :], sep="\n")
    with file.with_suffix(".txt").open("w") as text:
        Console(file=text, width=200).print(*tables(report, results), sep="\n")
    if image is not None:
        save(picture(results, heading(report)), image)
    console.print(str(file))
    if _print_errors(console, results):
        raise click.ClickException("an operator failed, see above")


def _measured(
    planned: list[Case], device: torch.device, machine: Rates, sink: tuple[Path, dict[str, Any]]
) -> list[Result]:
    """Run the cases; `sink` is written after each, so a stopped run leaves its results."""
    results: list[Result] = []
    for case in track(planned, "measuring", console=Console(stderr=True), transient=True):
        results.append(_out_of_reach(case, device, machine) or measure.run(case, device, machine))
        write(*sink, results)
    return results


def _out_of_reach(case: Case, device: torch.device, machine: Rates) -> Result | None:
    """The result of a case that would take a CPU too long; None for one that can run."""
    times = measure.floors(case, machine)
    if device.type == "cuda" or max(times) <= LONGEST_S:
        return None
    result = Result.of(case, machine)
    result.errors["all"] = f"{LEFT_OUT}a run takes at least {max(times):.1f} s"
    return result


def _print_errors(console: Console, results: list[Result]) -> bool:
    """Print the errors; whether one of them is a failure of our operators."""
    failed = False
    for result in results:
        for name, error in result.errors.items():
            console.print(f"{' '.join(label(result))}, {name}: {error}", highlight=False)
            failed |= name in (OURS, "all") and not error.startswith((LEFT_OUT, OUT_OF_MEMORY))
    return failed


if __name__ == "__main__":
    bench()
