"""Writes a base model's graph to the cache, once for each format and slice.

    python -m edge_runtime.adapters.export.onnx_base REQUEST

    FOLDER/model.onnx, model.onnx.data    as the request names the folder

The command is a process of its own, because it holds torch's model in memory: a server of the graph
does not. Without a folder in the request it says whether the graph can be written, and reads no weight.
"""

import sys
from pathlib import Path

import msgspec

from edge_runtime.adapters.export.onnx_form import GraphRequest
from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.errors import EdgeError
from edge_runtime.models.slices import kept_layers


def main() -> int:
    """Write the graph, or print one sentence that says why it cannot be written."""
    request = msgspec.json.decode(sys.argv[1], type=GraphRequest)
    try:
        with lean_imports():  # importing and loading import the code of the model's family
            write(request)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"the graph for ONNX Runtime cannot be written: {error}\n")
        return EdgeError.exit_code
    return 0


def write(request: GraphRequest) -> None:
    """Write the graph; raises InputError where there is none of the model, EdgeError or OSError."""
    from edge_runtime.adapters.export import onnx, onnx_model
    from edge_runtime.compat.empty_model import empty_model
    from edge_runtime.models import weights

    facts, layers = request.facts, kept_layers(request.depth, request.facts.layers)
    if request.folder is None:
        onnx_model.check(empty_model(weights.configuration(facts, layers)))
        return
    model = weights.load(facts, request.depth, request.format)
    folder = Path(request.folder)
    folder.mkdir()
    onnx.write_base(model, facts.model_class, layers, folder)


if __name__ == "__main__":
    sys.exit(main())
