"""Cuts a model to its first layers, as a checkpoint of its own, for studies on small machines.

A depth slice (models/slices.py) is something else: it keeps the layers next to the head, and trains
beside the whole model.
"""

import shutil
import sys
from pathlib import Path

import msgspec
from filelock import Timeout

from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.state import once

TIMEOUT_S = 600.0
TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "chat_template.jinja")


def cut(source: str, layers: int, models: Path) -> str:
    """The folder of the cut model in the cache, made on the first call.

    source is as in a catalog; relative paths start from the folder `models`.

    Raises:
        InputError: the model has fewer layers, cannot be cut, or is being cut by another process
            that does not end.
    """
    facts = processes.prepared(source, models)
    if not 1 <= layers <= facts.layers:
        raise InputError(f"{source} has {facts.layers} layers, so it cannot be cut to its first {layers}")
    # the prepared folder's name tells the versions that read the weights
    name = f"{facts.model_class.replace('@', '-')}-first-{layers}"
    folder = processes.cache_folder() / "cut" / Path(facts.folder).name / name

    def write(fresh: Path) -> None:
        # In a process of its own: the memory of this one is for training.
        command = ["edge_runtime.simulation.cut", str(layers), str(fresh)]
        processes.output([*command, msgspec.json.encode(facts).decode()], TIMEOUT_S, InputError)

    try:
        once(folder, write, TIMEOUT_S)  # runs in other workers may need the same model
    except Timeout as error:
        raise InputError(
            f"{source} cannot be cut: for {TIMEOUT_S:g} s another process has held {error.lock_file}; wait for "
            "the study that runs there, or end it"
        ) from error
    return str(folder)


def main(layers: int, folder: Path, facts: Facts) -> None:
    """Write the model that is cut to its first layers."""
    from edge_runtime.models import structure, weights

    model = weights.load(facts, facts.layers, "bfloat16")
    config = model.config.get_text_config()
    del structure.blocks(model)[layers:]
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model.save_pretrained(folder)
    for pattern in TOKENIZER_FILES:
        for file in Path(facts.folder).glob(pattern):
            shutil.copy(file, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=Facts))
