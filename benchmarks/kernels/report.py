"""The report of a run: the machine, a table for each operator, and one compact file of results."""

import json
import os
import platform
import re
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.kernels.cases.case import OURS
from benchmarks.kernels.measure import Measured, Result

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "bitsandbytes")


def described(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the date, without which a number means nothing."""
    gpu = device.type == "cuda"
    processor = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "machine": torch.cuda.get_device_name(device) if gpu else processor,
        "device": device.type,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load": None if gpu else os.getloadavg()[0],  # of the processor, over the minute before
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
    name = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


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
    """A JSON object a line: the machine, then the cases, with four digits of each number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [report, *(rounded(asdict(result)) for result in results)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rounded(value: Any) -> Any:
    """The value with its floats rounded to four digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def tables(report: dict[str, Any], results: list[Result]) -> list[Any]:
    """What a person reads: the heading's lines, and a table for each operator."""
    groups = groupby(results, lambda result: result.operator)
    return [*heading(report), *(table(operator, list(group)) for operator, group in groups)]


def label(result: Result) -> list[str]:
    """Operator, kind, shape and tokens, without those that the case lacks."""
    tokens = f"{result.tokens} tokens" if result.tokens else ""
    return [part for part in (result.operator, result.kind, result.shape, tokens) if part]


def table(operator: str, results: list[Result]) -> Table:
    """A row a case: every variant's median time, our ratios, and memory.

    The ratios are our time over the fastest rival's, and over the slower floor. Memory is what is
    held between runs and the peak of a run above that.
    """
    names = list(dict.fromkeys(name for result in results for name in result.variants))
    view = Table("shape", "tokens", title=operator, title_justify="left", box=box.SIMPLE)
    for name in (*names, "ours / best rival", "ours / floor", "ours, MiB", "leanest rival, MiB"):
        view.add_column(name, justify="right")
    for result in results:
        ours = result.variants.get(OURS)
        rivals = {name: part for name, part in result.variants.items() if not name.startswith(OURS)}
        times = [short(result.variants[name].median_s) if name in result.variants else "-" for name in names]
        ratio = f"{max(result.ours_to[name] for name in rivals):.2f}" if ours and rivals else "-"
        floor = f"{ours.to_slower_floor:.2f}" if ours else "-"
        memory = [_mib([ours] if ours else []), _mib(list(rivals.values()))]
        shape = " ".join(part for part in (result.shape, result.kind) if part)
        view.add_row(shape, str(result.tokens or "-"), *times, ratio, floor, *memory)
    return view


def _mib(variants: list[Measured]) -> str:
    """The least memory of several variants, held and at the peak."""
    totals = [part.held_bytes + part.peak_bytes for part in variants if part.peak_bytes is not None]
    return f"{min(totals) / 2**20:.1f}" if totals else "-"


def short(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
