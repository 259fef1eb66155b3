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


@click.group()
def main() -> None:
    """The operators of low-memory fine-tuning: check their kernels."""


@main.command()
@click.option(
    "--arch", "architectures", multiple=True, type=click.Choice([str(n) for n in ahead.ARCHITECTURES])
)
@click.option("--only", "chosen", multiple=True, help="An operator's file, as rms_norm; may be given again.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there."
)
def check(architectures: tuple[str, ...], chosen: tuple[str, ...], file: Path | None) -> None:
    """Compile every kernel in every configuration ahead of time; no GPU is needed.

    Fails where registers spill, where shared memory is above what the architecture has, and where loads that should be
    vectors are not.
    """
    known = {name.rpartition(".")[2]: name for name in ahead.operators()}
    if unknown := [name for name in chosen if name not in known]:
        raise click.UsageError(f"{unknown[0]} is no operator with kernels; these are: {', '.join(known)}")
    began = time.monotonic()
    try:
        compiled = ahead.compile_all(
            [known[name] for name in chosen or known],
            tuple(int(name) for name in architectures) or ahead.ARCHITECTURES,
        )
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(compiled))
    faults = [one for one in compiled if one.faults]
    for one in faults:
        console.print(f"{one.name} on sm_{one.architecture}: {'; '.join(one.faults)}", style="red")
    if file is not None:
        file.write_text(json.dumps([dataclasses.asdict(one) for one in compiled], indent=1) + "\n")
    console.print(f"{len(compiled)} configurations, {len(faults)} faulty, {time.monotonic() - began:.0f} s")
    sys.exit(1 if faults else 0)


def _table(compiled: list[ahead.Compiled]) -> Table:
    """A row an operator and architecture: the most that any of its configurations takes, and the median of its code."""
    columns = (
        "operator",
        "arch",
        "kernels",
        "registers",
        "spilled B",
        "shared KiB",
        "instructions",
        "async copies",
    )
    table = Table(
        *columns,
        title="Most of any configuration; instructions: median and most; async copies: fewest and most",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for (operator, architecture), group in groupby(compiled, lambda one: (one.operator, one.architecture)):
        rows = list(group)
        code = [one.instructions for one in rows]
        copies = [one.asynchronous_copies for one in rows]
        table.add_row(
            operator,
            f"sm_{architecture}",
            str(len(rows)),
            str(max(one.registers for one in rows)),
            str(max(one.spilled_bytes for one in rows)),
            f"{max(one.shared_bytes for one in rows) / 1024:.1f}",
            f"{statistics.median(code):.0f}, {max(code)}",
            f"{min(copies)}, {max(copies)}",
            end_section=architecture == ahead.ARCHITECTURES[-1],
        )
    return table


if __name__ == "__main__":
    main()
