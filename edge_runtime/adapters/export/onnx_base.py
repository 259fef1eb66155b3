"""Writes a base model's graph to the cache, once for each format and slice.

    python -m edge_runtime.adapters.export.onnx_base REQUEST

    FOLDER/model.onnx, model.onnx.data    as the request names the folder

The command is a process of its own, because it holds torch's model in memory: a server of the graph
does not.
"""

import sys
from pathlib import Path

import msgspec

from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.errors import EdgeError
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.settings import Weights


class GraphRequest(msgspec.Struct, frozen=True):
    """Which graph to write, and where."""

    facts: Facts
    depth: int  # layers that the slice keeps
    format: Weights
    folder: str  # that does not exist


def main() -> int:
    """Write the graph, or print one sentence that says why it cannot be written."""
    with lean_imports():
        from edge_runtime.adapters.export import onnx
        from edge_runtime.models import weights

    request = msgspec.json.decode(sys.argv[1], type=GraphRequest)
    try:
        with lean_imports():  # loading imports the code of the model's family
            model = weights.load(request.facts, request.depth, request.format)
        folder = Path(request.folder)
        folder.mkdir()
        layers = kept_layers(request.depth, request.facts.layers)
        onnx.write_base(model, request.facts.model_class, layers, folder)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
