"""Prints README's table of the demo: `python -m benchmarks.demo_table FEDIT.json LOCAL.json`.

The files are those of `edge-runtime demo --json FILE` and `edge-runtime demo --method local --json FILE`.
"""

import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import msgspec

from edge_runtime.demo.outcome import DemoOutcome

MIB = 1 << 20
HEAD = """| device | layers | peak: predicted / measured / budget | others' rows, fedit | local | own rows, fedit | local |
|---|---|---|---|---|---|---|"""


def main(files: list[str]) -> None:
    """Print the table, and the line that says where and when it was made."""
    fedit, local = (msgspec.json.decode(Path(file).read_bytes(), type=DemoOutcome) for file in files)
    lines = [HEAD]
    for device, control in zip(fedit.devices, local.devices, strict=True):
        sizes = (device.predicted_peak_bytes, device.measured_peak_bytes, device.budget_bytes)
        cells = [
            device.id,
            str(device.depth),
            " / ".join(f"{size / MIB:.0f}" for size in sizes) + " MiB",
            f"**{_score(device.others_loss_after, device.others_accuracy_after)}**",
            _score(control.others_loss_after, control.others_accuracy_after),
            _score(device.loss_after, device.accuracy_after),
            _score(control.loss_after, control.accuracy_after),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines.append(
        f"\nPython {platform.python_version()}, {packages}, {date.today().isoformat()}; one run each, equal steps and "
        f"seeds; {fedit.seconds:.0f} and {local.seconds:.0f} s."
    )
    sys.stdout.write("\n".join(lines) + "\n")


def _score(loss: float | None, accuracy: float) -> str:
    return f"{'not finite' if loss is None else f'{loss:.3f}'}, {accuracy:.0%}".replace("%", " %")


if __name__ == "__main__":
    main(sys.argv[1:])
