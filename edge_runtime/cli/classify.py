"""`edge-runtime classify`: the labels of texts, by a head that was learned."""

from functools import partial

import click

from edge_runtime.cli import options, served
from edge_runtime.errors import InputError


@click.command("classify")
@served.base
@click.option("--text", "texts", required=True, multiple=True, help="May be given more than once.")
@options.as_json
def command(base: served.ServedBase, texts: tuple[str, ...], json: bool) -> None:
    """Show the labels of a text with their probabilities.

    For what a fleet with a [head] has learned.
    """
    from edge_runtime.cli import views
    from edge_runtime.compat.lean_imports import lean_imports

    texts = tuple(served.typed(partial(str, text)) for text in texts)
    read, machine = base.read(), base.machine()
    if read is None or read.head is None:
        raise InputError(
            "no label head was learned, so there are no labels to choose from: a fleet learns one with [head] in its "
            "fleet file; use `edge-runtime generate` where labels are learned as text"
        )
    facts, learned = base.on_base(read)
    assert learned is not None
    base.tell_loading(facts)
    with lean_imports():
        from edge_runtime.serving.labels import Classifier
        from edge_runtime.trainer import meter

    meter.prepare(machine)
    classifier = Classifier(facts, learned, base.weights, machine.device)
    for text in texts:
        labels = classifier.labels(text)
        if json:
            click.echo(options.json_line({"text": text, "labels": labels}))
        else:
            views.show_labels(labels)
