"""Cuts a model to its first layers, as a checkpoint of its own: a study on a small machine needs small models.

Not a depth slice (models/slices.py), which keeps the layers next to the head and is meant to be trained beside the whole.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
from edge_broker import files
from filelock import FileLock

from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes

TIMEOUT_S = 600.0
FILES = ("*token*", "*vocab*", "merges.txt", "chat_template.jinja")


def cut(source: str, layers: int, models: Path) -> str:
    """The folder of the cut model, made unless it is there; raises InputError where the model cannot be cut so."""
    facts = processes.prepared(source, models)
    if not 1 <= layers <= facts.layers:
        raise InputError(f"{source} has {facts.layers} layers, so it cannot be cut to its first {layers}")
    folder = processes.cache_folder() / "cut" / f"{facts.model_class.replace('@', '-')}-first-{layers}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=TIMEOUT_S):  # several runs may want the same one
        if not folder.exists():
            _cut(facts, layers, folder)
    return str(folder)


def _cut(facts: Facts, layers: int, folder: Path) -> None:
    """Make it in a process of its own, as a run's keeps its memory for training."""
    command = [sys.executable, "-m", "edge_runtime.simulation.cut", str(layers)]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        done = subprocess.run(
            [*command, str(made)],
            input=msgspec.json.encode(facts),
            capture_output=True,
            timeout=TIMEOUT_S,
            env=processes.environment(),
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [
                f"exit code {done.returncode}"
            ]
            raise InputError(f"{facts.model_class} cannot be cut to its first {layers} layers: {said[-1]}")
        files.put(made, folder)


def _write(facts: Facts, layers: int, folder: Path) -> None:
    from edge_runtime.models import families as roles
    from edge_runtime.models import weights

    model = weights.load(facts, facts.layers, "bfloat16")
    config = model.config.get_text_config()
    del roles.blocks(model)[layers:]
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model.save_pretrained(folder)
    for pattern in FILES:
        for file in Path(facts.folder).glob(pattern):
            shutil.copy(file, folder)


def main() -> None:
    """Write a cut model; the whole one's facts are read from stdin."""
    parser = argparse.ArgumentParser(prog="python -m edge_runtime.simulation.cut")
    parser.add_argument("layers", type=int)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    _write(msgspec.json.decode(sys.stdin.buffer.read(), type=Facts), asked.layers, asked.folder)


if __name__ == "__main__":
    main()
