"""Draws time against tokens: a panel for each operator and kind, at the largest shape."""

import math
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.kernels.measure import Result

COLUMNS, PANEL = 4, (4.0, 2.9)  # panels beside each other; inches of one


def picture(results: list[Result], lines: list[str]) -> Figure:
    """A figure of the results.

    Args:
        results: those of one operator and kind follow each other.
        lines: the title's lines: machine, versions, rates.
    """
    drawn = [result for result in results if result.tokens and result.variants]
    panels = [list(group) for _, group in groupby(drawn, lambda result: (result.operator, result.kind))]
    panels = [[result for result in panel if result.shape == panel[-1].shape] for panel in panels]
    rows = max(math.ceil(len(panels) / COLUMNS), 1)
    figure = Figure(figsize=(COLUMNS * PANEL[0], rows * PANEL[1] + 1), layout="constrained")
    figure.suptitle("\n".join(line.replace("$", r"\$") for line in lines), fontsize=9)
    for number, panel in enumerate(panels):
        _panel(figure.add_subplot(rows, COLUMNS, number + 1), panel)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write the figure; the suffix of the file sets the format."""
    figure.savefig(file, dpi=110)


def _panel(axes: Axes, panel: list[Result]) -> None:
    """The lines of all variants, and of the slower floor."""
    for name in dict.fromkeys(name for result in panel for name in result.variants):
        points = [
            (result.tokens, result.variants[name].median_s) for result in panel if name in result.variants
        ]
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    floors = [(result.tokens, max(result.floor_bytes_s, result.floor_flops_s)) for result in panel]
    axes.plot(*zip(*floors, strict=True), color="grey", linestyle="--", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds")
    names = (panel[0].operator, panel[0].kind, panel[0].shape)
    axes.set_title(" ".join(name for name in names if name).replace("$", r"\$"), fontsize=9)
    axes.legend(fontsize=6)
