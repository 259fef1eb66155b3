"""`edge-runtime study`: methods compared on virtual devices."""

import os
from pathlib import Path

import click

from edge_runtime.cli.options import PATH, models
from edge_runtime.errors import EdgeError, InputError


@click.command("study")
@click.argument("spec", type=PATH)
@click.option("--seeds", help="Seeds to run, such as 0,1,2; default: the file's.")
@click.option("--arms", help="Arms to run, separated by commas, such as fedit,heterotune-gate; default: all.")
@click.option(
    "--out", type=PATH, help="Folder for runs, table and pictures; default: docs/study/ and the spec's name."
)
@click.option("--data", type=PATH, default=Path(), help="Folder of the study's data files.")
@models
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    help="Runs at a time, one core each; default: as many as there are cores.",
)
@click.option(
    "--plan",
    "hours",
    type=click.FloatRange(min=0, min_open=True),
    help="Make no run: print what each takes, and which fit into this many hours.",
)
def command(
    spec: Path,
    seeds: str | None,
    arms: str | None,
    out: Path | None,
    data: Path,
    models: Path,
    workers: int,
    hours: float | None,
) -> None:
    """Compare methods on virtual devices: a grid of arms by seeds.

    Finished runs are kept, so a study that was stopped continues when the command is given again.
    SPEC is a file such as those in studies/.
    """
    from edge_runtime.planning import processes
    from edge_runtime.simulation import grid, plan, report
    from edge_runtime.simulation import spec as specs

    if not processes.installed("matplotlib"):
        raise InputError(
            "a study's packages are not installed: in a clone of Edge Runtime, run pip install '.[study]'"
        )
    whole = specs.load(spec)
    selected = specs.chosen(whole, seeds, arms)
    folders = grid.Folders(data, models, out or Path("docs/study") / spec.stem)
    workers = workers or os.cpu_count() or 1
    if hours is not None:
        present = grid.finished(selected, selected.study.seeds, folders)
        return plan.show(selected, present, hours, workers)
    failures = grid.run(selected, folders, workers, click.echo)
    # the table has the file's seeds, and those that were asked for now
    runs = grid.finished(whole, dict.fromkeys((*whole.study.seeds, *selected.study.seeds)), folders)
    report.write(whole, runs, spec.stem, folders.out)
    report.show(whole, runs, spec.stem)
    click.echo(f"written: {folders.out / 'README.md'}")
    if failures:
        raise EdgeError(
            f"some runs failed; give the command again to try them once more: {'; '.join(failures)}"
        )
