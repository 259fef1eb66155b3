"""`edge-runtime profile`: this device as the planner sees it."""

import click
import edge_profiles
import msgspec

from edge_runtime.cli import options


@click.command("profile")
@options.as_json
def command(json: bool) -> None:
    """Show this device as the planner sees it.

    Cores, memory, GPU, board, and the memory that the runtime itself takes.
    """
    from edge_runtime.cli import views
    from edge_runtime.planning import processes

    baseline = processes.runtime_bytes() if processes.installed() else None
    values = {**msgspec.to_builtins(edge_profiles.probe()), "runtime_baseline_bytes": baseline}
    click.echo(options.json_line(values)) if json else views.show_profile(values)
