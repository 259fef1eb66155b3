"""Command line of the operators: `python -m edge_kernels check`."""

import dataclasses
import json
import statistics
import sys
import time
from itertools import groupby
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from edge_kernels import ahead

ARCHITECTURE = click.Choice([str(number) for number in ahead.ARCHITECTURES])
FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """The operators of low-memory fine-tuning: check their kernels."""


@main.command()
@click.option("--arch", "architectures", multiple=True, type=ARCHITECTURE, help="87 for sm_87.")
@click.option("--only", "names", multiple=True, help="An operator's file, as norms; may be given again.")
@click.option("--json", "file", type=FILE, help="Write the figures of every configuration to this file.")
def check(architectures: tuple[str, ...], names: tuple[str, ...], file: Path | None) -> None:
    """Compile every kernel in every configuration ahead of time; no GPU is needed.

    Fails where registers spill, where a kernel needs more shared memory than the architecture has,
    and where loads that should be vectors are not.
    """
    modules = {name.rpartition(".")[2]: name for name in ahead.operators()}
    if unknown := [name for name in names if name not in modules]:
        raise click.UsageError(f"{unknown[0]} is no operator with kernels; these are: {', '.join(modules)}")
    began = time.monotonic()
    try:
        compiled = ahead.compile_all(
            [modules[name] for name in names or modules],
            tuple(map(int, architectures)) or ahead.ARCHITECTURES,
        )
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(compiled))
    faulty = [result for result in compiled if result.faults]
    for result in faulty:
        console.print(f"{result.name} on sm_{result.architecture}: {'; '.join(result.faults)}", style="red")
    if file is not None:
        file.write_text(json.dumps([dataclasses.asdict(result) for result in compiled], indent=1) + "\n")
    console.print(f"{len(compiled)} configurations, {len(faulty)} faulty, {time.monotonic() - began:.0f} s")
    sys.exit(1 if faulty else 0)


def _table(compiled: list[ahead.Compiled]) -> Table:
    """One row for each operator and architecture."""
    title = "Most of any configuration; instructions: median and most; async copies: fewest and most"
    table = Table("operator", "arch", title=title)
    for column in ("kernels", "registers", "spilled B", "shared KiB", "instructions", "async copies"):
        table.add_column(column, justify="right")
    for (operator, architecture), group in groupby(compiled, lambda c: (c.operator, c.architecture)):
        results = list(group)
        instructions = [result.instructions for result in results]
        copies = [result.asynchronous_copies for result in results]
        table.add_row(
            operator,
            f"sm_{architecture}",
            str(len(results)),
            str(max(result.registers for result in results)),
            str(max(result.spilled_bytes for result in results)),
            f"{max(result.shared_bytes for result in results) / 1024:.1f}",
            f"{statistics.median(instructions):.0f}, {max(instructions)}",
            f"{min(copies)}, {max(copies)}",
            end_section=architecture == ahead.ARCHITECTURES[-1],
        )
    return table


if __name__ == "__main__":
    main()
