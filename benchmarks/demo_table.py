"""Prints README's table of the demo: `python -m benchmarks.demo_table DEMO.json [CONTROL.json]`.

DEMO.json is written by `edge-runtime demo --json FILE`, CONTROL.json by the same with `--method local`.
"""

import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import msgspec

from edge_runtime.demo.outcome import DemoOutcome, DeviceOutcome

MIB = 1 << 20
COLUMNS = (
    "device",
    "layers",
    "peak: predicted / measured / budget",
    "others' rows, before",
    "after",
    "own rows, after",
)


def main(files: list[str]) -> None:
    """Print the table, and a line on where and when it was made."""
    outcomes = [msgspec.json.decode(Path(file).read_bytes(), type=DemoOutcome) for file in files]
    demo, *controls = outcomes
    columns = [
        *COLUMNS,
        *(f"{kind} rows, {run.method} alone" for run in controls for kind in ("others'", "own")),
    ]
    lines = [_row(columns), "|---" * len(columns) + "|"]
    for index, device in enumerate(demo.devices):
        cells = _cells(device)
        for control in controls:
            alone = control.devices[index]
            cells += [_score(alone.others_loss_after, alone.others_accuracy_after)]
            cells += [_score(alone.loss_after, alone.accuracy_after)]
        lines.append(_row(cells))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    seconds = " and ".join(f"{run.seconds:.0f} s with {run.method}" for run in outcomes)
    lines += [
        "",
        f"Python {platform.python_version()}, {packages}, {date.today().isoformat()}; one run each: {seconds}.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _cells(device: DeviceOutcome) -> list[str]:
    sizes = (device.predicted_peak_bytes, device.measured_peak_bytes, device.budget_bytes)
    return [
        device.id,
        str(device.depth),
        " / ".join(f"{size / MIB:.0f}" for size in sizes) + " MiB",
        _score(device.others_loss_before, device.others_accuracy_before),
        f"**{_score(device.others_loss_after, device.others_accuracy_after)}**",
        _score(device.loss_after, device.accuracy_after),
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _score(loss: float | None, accuracy: float) -> str:
    return f"{'not finite' if loss is None else f'{loss:.3f}'}, {100 * accuracy:.0f} %"


if __name__ == "__main__":
    main(sys.argv[1:])
