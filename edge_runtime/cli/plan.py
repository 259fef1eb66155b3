"""`edge-runtime plan`: which model of a fleet's catalog fits a budget."""

from pathlib import Path
from typing import Any

import click
import edge_profiles

from edge_runtime.cli import options
from edge_runtime.errors import InputError


@click.command("plan")
@options.fleet_file
@options.budget
@click.option("--board", metavar="NAME", help="Plan for another board, such as jetson-orin-nano-8gb.")
@options.models
@options.device
@click.option("--serve", is_flag=True, help="With a server beside the trainer, as `agent --serve` has it.")
@options.context
@options.parallel
@options.as_json
def command(
    fleet: Path,
    budget: str | None,
    board: str | None,
    models: Path,
    device: str,
    json: bool,
    serve: bool,
    **size: Any,
) -> None:
    """Show which model fits, and why no larger one.

    For this device, or with --board for a board that is not at hand.
    """
    from edge_runtime import methods, settings
    from edge_runtime.cli import views
    from edge_runtime.planning import processes
    from edge_runtime.planning.graphs import with_onnx
    from edge_runtime.planning.predict import Serving
    from edge_runtime.planning.search import choose
    from edge_runtime.planning.serving import require_servable

    settings_ = settings.load(fleet)
    # A fleet that its node would refuse is refused here too.
    method = methods.of(settings_)
    if serve:
        require_servable(method)
    deadline_s = settings_.training.step_deadline_s
    if board and deadline_s is not None:
        raise InputError(
            "[training] step_deadline_s cannot be kept for a board one does not have: its speed was never measured; "
            "leave the key out to plan for the board's memory alone"
        )
    profile = edge_profiles.probe()
    budget_bytes = options.budget_bytes(budget, board, profile)
    facts = processes.catalog_facts(settings_, models)
    rates = processes.rates(device := options.trainer_device(device, profile))
    serving = with_onnx(Serving(**size), facts, device) if serve else None
    choice = choose(settings_, facts, budget_bytes, processes.runtime_bytes(), rates, serving=serving)
    if json:
        click.echo(options.json_line(views.plan_values(choice, budget_bytes, deadline_s)))
    else:
        views.show_plan(choice, budget_bytes, deadline_s)
