"""`edge-runtime export`: what was learned, in the form of another tool."""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from edge_runtime.adapters.export import Form
from edge_runtime.cli import options
from edge_runtime.errors import InputError
from edge_runtime.state import NEWEST

if TYPE_CHECKING:
    from edge_runtime.models.facts import Facts


@click.command("export")
@click.option("--state", type=options.PATH, help="Export the newest adapter of this agent's state folder.")
@click.option("--node", type=options.PATH, help="Export a version out of this node's state folder.")
@click.option("--adapter", type=options.PATH, help="Export an adapter's folder, as --to peft writes it.")
@click.option(
    "--to", "form", type=click.Choice(get_args(Form)), required=True, help="The tool; docs/use.md shows each."
)
@click.option("--out", type=options.PATH, required=True, help="A folder that does not exist yet.")
@click.option(
    "--class", "model_class", metavar="NAME", help="With --node: the model class; default: the only one."
)
@click.option(
    "--version", type=int, help="With --node: the round it was published after; default: the newest."
)
@click.option(
    "--depth",
    type=click.IntRange(1),
    help="With --node: layers of the slice; default: the deepest that was trained.",
)
@click.option(
    "--model", metavar="SRC", help="The base model; default: where it was when the adapter was trained."
)
@click.option(
    "--base",
    metavar="FILE",
    help="A GGUF file of the base model, for llama.cpp; default: the base, if it is one.",
)
@click.option(
    "--weights",
    metavar="FORMAT",
    help="With --to merged-gguf: f32, f16, bf16 or q8_0 for the merged weights; default: the file's own. With --to "
    "onnx: of the base, such as q4_0; default: q8_0.",
)
@options.models
def command(
    state: Path | None,
    node: Path | None,
    adapter: Path | None,
    form: Form,
    out: Path,
    model: str | None,
    base: str | None,
    weights: str | None,
    models: Path,
    model_class: str | None,
    version: int | None,
    depth: int | None,
) -> None:
    """Write an adapter for another tool, and check there that nothing was lost.

    Give one of --state, --node and --adapter. The label head and its labels are written beside the
    adapter, if the fleet has them.
    """
    from edge_runtime.adapters import learned
    from edge_runtime.planning import processes

    if sum(source is not None for source in (state, node, adapter)) != 1:
        raise InputError("give one of --state, --node and --adapter: where the adapter is")
    of_the_node = {"--class": model_class, "--version": version, "--depth": depth}
    if node is None and (unused := [name for name, value in of_the_node.items() if value is not None]):
        raise InputError(
            f"{', '.join(unused)} chooses among a node's versions, but --node is not given: leave it out, or give the "
            "node's state with --node"
        )
    if out.exists():
        raise InputError(f"--out is {out}, which exists: give a folder that does not")
    if not processes.installed():
        raise InputError(processes.NOT_INSTALLED)

    def find(source: str) -> "Facts":
        try:
            return options.facts_of(model or source, models)
        except InputError as error:
            raise InputError(f"{error}; or say with --model where the base is") from error

    if node is not None:
        from edge_runtime.aggregator import learned as of_node

        adapted = of_node.read(node, find, model_class, version, depth)
    else:
        adapted = learned.read(adapter or _newest(state))
        adapted = learned.on(adapted, find(adapted.source))
    gguf = options.facts_of(base, models) if base is not None else None
    from edge_runtime.adapters.export import base as bases  # imports torch, after what is refused without it
    from edge_runtime.adapters.export import forms

    if gguf is not None:
        adapted = bases.on_other_file(adapted, gguf)
    forms.export(form, adapted, out, weights, options.tell)
    labels = f"; labels of its head: {', '.join(adapted.labels)}" if adapted.labels else ""
    click.echo(
        f"{out}: version {adapted.version} on {adapted.facts.model_class}, {len(adapted.layers)} of {adapted.facts.layers} "
        f"layers{labels}"
    )


def _newest(state: Path | None) -> Path:
    """The folder of an agent's newest adapter."""
    assert state is not None
    folder = state / NEWEST
    if not folder.exists():
        raise InputError(
            f"{state} has no adapter: its agent writes one when it begins to train for a fleet, and anew for each version, "
            "but none with branches that depend on the token, which are no LoRA"
        )
    return folder
