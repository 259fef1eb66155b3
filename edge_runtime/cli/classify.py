"""`edge-runtime classify`: the labels of texts, by a head that was learned."""

import click

from edge_runtime.cli import options, served


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

    facts, learned = base.open()
    with lean_imports():
        from edge_runtime.serving.labels import Classifier
        from edge_runtime.trainer import meter

    meter.prepare(machine := base.machine())
    classifier = Classifier(facts, learned, base.weights, machine.device)
    for text in texts:
        labels = classifier.labels(text)
        if json:
            click.echo(options.json_line({"text": text, "labels": labels}))
        else:
            views.show_labels(labels)
