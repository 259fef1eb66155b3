"""python -m benchmarks.kernels: every operator and a decoder layer beside their rivals, in one run on this machine.

Tables on the terminal; in files, a JSON with all numbers and the machine, and beside it a picture of time against tokens.
"""

import json
import math
import os
import platform
import re
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kernels import cases, measure
from benchmarks.kernels.cases import OPERATORS, OURS, SHAPES, SMALL, Case
from benchmarks.kernels.measure import OUT_OF_MEMORY, Rates, Result

FOLDER = Path("benchmarks/results/kernels")
TOKENS, QUICK_TOKENS = [32, 64, 128, 256, 512, 1024, 2048, 4096], [32, 256, 1024]
CPU_SHAPES, CPU_TOKENS = SHAPES[:1], TOKENS[:6]
LONGEST_S = 0.5  # floor of a case that a CPU still does
LEFT_OUT = "left out: "
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "bitsandbytes")


@click.command()
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help=f"Where to write; default: {FOLDER}/MACHINE.json.",
)
@click.option("--quick", is_flag=True, help="A small model's shape alone, at three numbers of tokens.")
@click.option(
    "--only", type=click.Choice(list(OPERATORS)), multiple=True, help="This operator; may be given again."
)
@click.option(
    "--device", "kind", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU where there is one."
)
def bench(file: Path | None, quick: bool, only: tuple[str, ...], kind: str | None) -> None:
    """Measure the operators beside plain torch, torch.compile, PEFT, Liger and bitsandbytes.

    All in one run, in turns: time, peak memory, and what the shapes would take at this machine's best. Rivals that are not
    installed are left out. On a CPU: the smallest of the models' shapes, up to 1024 tokens.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "--device cuda needs a GPU that torch can use, and it sees none; try --device cpu"
        )
    device = torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
    every = device.type == "cuda"
    shapes, tokens = (
        ([SMALL], QUICK_TOKENS) if quick else (SHAPES, TOKENS) if every else (CPU_SHAPES, CPU_TOKENS)
    )
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    report = described(device)
    machine = measure.rates(device)
    report["rates"] = asdict(machine)
    file = (
        file or FOLDER / f"{'-'.join([slug(report['machine']), *['quick'] * quick, *map(slug, only)])}.json"
    )
    console.print(*heading(report), sep="\n")
    if not quick and not every:
        console.print(
            f"left out on a CPU: {', '.join(s.name for s in SHAPES if s not in shapes)}; over {tokens[-1]} tokens"
        )

    results: list[Result] = []
    planned = list(cases.select(shapes, tokens, only or None))
    for case in track(planned, "measuring", console=Console(stderr=True), transient=True):
        results.append(_out_of_reach(case, device, machine) or measure.run(case, device, machine))
        write(file, report, results)  # each time, so that a run that is stopped leaves what it has
    if not every:
        report["load_after"] = os.getloadavg()[
            0
        ]  # far above the threads: others took part, and the times are theirs too
        console.print(f"load {report['load']:.1f} before, {report['load_after']:.1f} after")
        write(file, report, results)
    for operator, found in groupby(results, lambda result: result.operator):
        console.print(table(operator, list(found)))
    failed = False
    for result in results:
        for name, error in result.errors.items():
            console.print(f"{' '.join(label(result))}, {name}: {error}", highlight=False)
            failed |= name in (OURS, "all") and not error.startswith((LEFT_OUT, OUT_OF_MEMORY))
    console.print(f"{file}\n{file.with_suffix('.svg')}")
    if failed:
        raise click.ClickException("an operator failed, see above")


def _out_of_reach(case: Case, device: torch.device, machine: Rates) -> Result | None:
    """What stands for a case that a CPU would take too long for."""
    times = measure.floors(case, machine)
    if device.type == "cuda" or max(times) <= LONGEST_S:
        return None
    result = Result.of(case, machine)
    result.errors["all"] = f"{LEFT_OUT}a run takes at least {max(times):.1f} s"
    return result


# --- the report


def described(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the date: what a number needs to be worth something."""
    gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device)
        if gpu
        else f"{_processor()}, {torch.get_num_threads()} threads",
        "device": device.type,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load": None
        if gpu
        else os.getloadavg()[0],  # what others left of the processor, over the minute before
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def heading(report: dict[str, Any]) -> list[str]:
    """Machine, versions and rates in a few lines."""
    versions, rate = report["versions"], report["rates"]
    missing = [name for name, version in versions.items() if version is None]
    noise, load = rate["peak_noise_bytes"], report["load"]
    return [
        f"{report['machine']}, {report['date']}" + (f", load {load:.1f} before" if load is not None else ""),
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + (f"; not installed: {', '.join(missing)}" if missing else ""),
        f"copies {rate['bytes_per_s'] / 1e9:.1f} GB/s, multiplies {rate['flops_per_s'] / 1e12:.2f} TFLOP/s; "
        + ("peaks cannot be measured" if noise is None else f"peaks measured to {noise / 1024:.0f} KiB"),
    ]


def write(file: Path, report: dict[str, Any], results: list[Result]) -> None:
    """The report with its cases as JSON, and the picture beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**report, "cases": [asdict(result) for result in results]}, indent=1) + "\n")
    file.with_suffix(".svg").write_text(picture(results, heading(report)))


def label(result: Result) -> list[str]:
    """Operator, kind, shape and tokens, those that there are."""
    tokens = f"{result.tokens} tokens" if result.tokens else ""
    return [part for part in (result.operator, result.kind, result.shape, tokens) if part]


def table(operator: str, results: list[Result]) -> Table:
    """A row a case: every variant's median time; ours over the fastest rival's and the slower floor; memory.

    Memory is what is held between runs and the peak of a run above it.
    """
    names = list(dict.fromkeys(name for result in results for name in result.variants))
    columns = [*names, "ours / best rival", "ours / floor", "ours, MiB", "leanest rival, MiB"]
    view = Table("shape", "tokens", title=operator, title_justify="left")
    for name in columns:
        view.add_column(name, justify="right")
    for result in results:
        ours = result.variants.get(OURS)
        rivals = {name: it for name, it in result.variants.items() if not name.startswith(OURS)}
        times = [short(result.variants[name].median_s) if name in result.variants else "-" for name in names]
        ratio = f"{max(result.ours_to[name] for name in rivals):.2f}" if ours and rivals else "-"
        floor = f"{ours.to_slower_floor:.2f}" if ours else "-"
        memory = [_mib([ours] if ours else []), _mib(list(rivals.values()))]
        shape = " ".join(part for part in (result.shape, result.kind) if part)
        view.add_row(shape, str(result.tokens or "-"), *times, ratio, floor, *memory)
    return view


def _mib(measured: list[Any]) -> str:
    """What is held and the peak above it, the least of some."""
    totals = [it.held_bytes + it.peak_bytes for it in measured if it.peak_bytes is not None]
    return f"{min(totals) / 2**20:.1f}" if totals else "-"


def short(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


# --- the picture

PANEL, INNER, LEFT, TOP, COLUMNS = (
    (300, 215),
    (225, 145),
    60,
    30,
    4,
)  # pixels; the inner box holds the lines
COLOURS = (
    "#d62728",
    "#1f77b4",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#8c564b",
    "#17becf",
    "#bcbd22",
    "#e377c2",
    "#5254a3",
)
DASHES = ("", ' stroke-dasharray="6 2"', ' stroke-dasharray="1 2"')  # where colours do not suffice


def picture(results: list[Result], lines: list[str]) -> str:
    """Time against tokens, both logarithmic, as SVG: a panel each operator and kind, with the largest shape measured.

    Args:
        lines: what to say above it.
    """
    found = [result for result in results if result.tokens and result.variants]
    panels = [list(group) for _, group in groupby(found, lambda result: (result.operator, result.kind))]
    panels = [[result for result in panel if result.shape == panel[-1].shape] for panel in panels]
    names = list(dict.fromkeys(name for panel in panels for result in panel for name in result.variants))
    strokes = {
        name: f'stroke="{COLOURS[number % len(COLOURS)]}"{DASHES[number // len(COLOURS) % len(DASHES)]}'
        for number, name in enumerate(names)
    }
    strokes["floor"] = 'stroke="#999" stroke-dasharray="4 3"'
    body = [_text(10, 18 + 15 * number, line, "start") for number, line in enumerate(lines)]
    head = 25 + 15 * len(lines)
    for number, (name, stroke) in enumerate(strokes.items()):
        x, y = 10 + 195 * (number % 6), head + 18 * (number // 6)
        body.append(
            f'<path d="M{x} {y}h20" {stroke} stroke-width="2"/>' + _text(x + 25, y + 4, name, "start")
        )
    head += 18 * (1 + (len(strokes) - 1) // 6)
    for number, panel in enumerate(panels):
        x, y = PANEL[0] * (number % COLUMNS), head + PANEL[1] * (number // COLUMNS)
        body.append(f'<g transform="translate({x},{y})">{_panel(panel, strokes)}</g>')
    width, height = PANEL[0] * COLUMNS, head + PANEL[1] * -(-len(panels) // COLUMNS)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = 'font-family="sans-serif" font-size="11" fill="none"'
    return "\n".join(
        [f"{start} {style}>", f'<rect width="{width}" height="{height}" fill="white"/>', *body, "</svg>\n"]
    )


def _panel(panel: list[Result], strokes: dict[str, str]) -> str:
    """One case's lines in a box with its axes; strokes: how each variant's line, and the floor's, is drawn."""
    lines = {
        name: [(result.tokens, result.variants[name].median_s) for result in panel if name in result.variants]
        for name in strokes
    }
    lines["floor"] = [(result.tokens, max(result.floor_bytes_s, result.floor_flops_s)) for result in panel]
    tokens, seconds = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    across, up = _axis(tokens, INNER[0]), _axis(seconds, INNER[1])
    bottom = TOP + INNER[1]
    body = [_text(8, TOP - 8, " ".join(label(panel[0])[:-1]), "start", bold=True)]
    body.append(f'<rect x="{LEFT}" y="{TOP}" width="{INNER[0]}" height="{INNER[1]}" stroke="#333"/>')
    body += [_text(LEFT + across(count), bottom + 14, str(count)) for count in sorted(set(tokens))]
    body.append(_text(LEFT + INNER[0] / 2, bottom + 27, "tokens"))
    for tick in _ticks(min(seconds), max(seconds)):
        y = bottom - up(tick)
        body.append(
            f'<path d="M{LEFT} {y:.1f}h{INNER[0]}" stroke="#ddd"/>'
            + _text(LEFT - 4, y + 4, short(tick), "end")
        )
    for name, points in lines.items():
        path = " ".join(f"{LEFT + across(count):.1f},{bottom - up(second):.1f}" for count, second in points)
        body.append(f'<polyline points="{path}" {strokes[name]} stroke-width="1.5"/>' if path else "")
    return "\n".join(body)


def _axis(values: list[float], length: int) -> Any:
    """Where on an axis of some pixels a value is, from 5 % to 95 % of it."""
    low, high = math.log(min(values)), math.log(max(values))
    return lambda value: (
        length * (0.05 + 0.9 * ((math.log(value) - low) / (high - low) if high > low else 0.5))
    )


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten in a range; with less than two of them, 2 and 5 times them, too."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    inside = [power for power in powers if low <= power <= high]
    if len(inside) < 2:
        inside = [power * part for power in powers for part in (1, 2, 5) if low <= power * part <= high]
    return inside


def _text(x: float, y: float, text: str, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222"{weight}>{escape(text)}</text>'
