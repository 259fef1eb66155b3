"""`edge-runtime measure`: predicted beside measured memory and time of a few training steps."""

from pathlib import Path
from typing import Any

import click
import edge_profiles

from edge_runtime.cli import options
from edge_runtime.errors import InputError


@click.command("measure")
@click.option("--model", required=True, help="A folder in Hugging Face's layout, a GGUF file or a hub id.")
@click.option(
    "--random-weights", is_flag=True, help="Draw the weights: the model's folder needs only a config.json."
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "bfloat16", "q8_0", "q4_1", "q4_0", "nf4"]),
    default="bfloat16",
    show_default=True,
    help="Format of the frozen weights.",
)
@click.option(
    "--boundaries",
    type=click.Choice(["input", "int8"]),
    default="input",
    show_default=True,
    help="Form in which each block's input is kept for backward.",
)
@click.option(
    "--stream", "streamed", is_flag=True, help="Read a block's packed weights from a file while it runs."
)
@click.option(
    "--kept-blocks",
    default=0,
    show_default=True,
    help="Blocks that keep their activations and do not run again in backward.",
)
@click.option("--rank", default=16, show_default=True, help="Rank of the adapter on all linear layers.")
@click.option("--batch", "rows", default=4, show_default=True, help="Rows of a step.")
@click.option("--tokens", default=256, show_default=True, help="Tokens of a row.")
@click.option(
    "--steps",
    default=6,
    show_default=True,
    help="Steps to train; the time is the median after the first two.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@options.board
@click.option(
    "--against",
    type=click.Choice(["peft"]),
    help="Train the same rows with PEFT too, in a process of its own.",
)
@options.models
@options.as_json
def command(
    model: str,
    random_weights: bool,
    device: str,
    board: str | None,
    against: str | None,
    models: Path,
    json: bool,
    **values: Any,
) -> None:
    """Train a model for a few steps, and show memory and time.

    Predicted and measured peak of each phase, the time of a step, and PEFT's figures beside them.
    """
    from edge_runtime.agent.measure import Trial, measure
    from edge_runtime.cli import views
    from edge_runtime.methods import MOST_RANK
    from edge_runtime.trainer.job import Machine

    trial = Trial(**values)
    counts = {"rank": trial.rank, "batch": trial.rows, "tokens": trial.tokens, "steps": trial.steps}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name} is {value}, but has to be 1 or more")
    if trial.rank > MOST_RANK:
        raise InputError(f"--rank is {trial.rank}, but can be {MOST_RANK} at most")
    profile = edge_profiles.probe()
    measurement = measure(
        model,
        models,
        trial,
        peft=against == "peft",
        random_weights=random_weights,
        machine=Machine(
            device=options.trainer_device(device, profile),
            gpu_cap_bytes=options.gpu_cap_bytes(board, device, profile),
        ),
    )
    click.echo(options.json_line(measurement)) if json else views.show_measurement(measurement)
