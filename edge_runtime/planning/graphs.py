"""Graphs for ONNX Runtime: which models have one, and writing it, each in a process with torch.

    MODEL/graphs/FORM-FORMAT-DEPTH/    model.onnx, model.onnx.data, in a prepared model's folder

The process that writes holds the model as a trainer does, and a piece of a matrix. A planner calls it
before a trainer starts, so both never count at once.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_runtime.adapters.export.onnx_form import FORM, GraphRequest
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.planning.predict import Serving
from edge_runtime.settings import Weights
from edge_runtime.state import once

TIMEOUT_S = 3600.0  # writes as many bytes as the model has
MODULE = "edge_runtime.adapters.export.onnx_base"


def with_onnx(size: Serving, facts: Mapping[str, Facts], device: str) -> Serving:
    """What a server may be asked, and which of the models ONNX Runtime can serve on this device."""
    fault = ""
    if device != "cpu":
        fault = f"ONNX Runtime computes on the CPU, and the device is {device}"
    elif not processes.installed("onnx", "onnxruntime"):
        fault = "the packages onnx and onnxruntime are not installed"
    faults = {model.model_class: fault or _fault(model) for model in facts.values()}
    unserved = {name: sentence for name, sentence in faults.items() if sentence}
    return size._replace(onnx_bytes=0 if fault else processes.onnx_bytes(), unserved=unserved)


def _fault(facts: Facts) -> str:
    """Why there is no graph of a model; "" where there can be."""
    request = msgspec.json.encode(GraphRequest(facts, facts.layers)).decode()
    try:
        processes.measured_once(f"graph-{FORM}-{Path(facts.folder).name}", [MODULE, request], InputError)
    except EdgeError as error:
        return str(error)
    return ""


def graph(facts: Facts, depth: int, format: Weights) -> Path:
    """The folder of a slice's graph, which is written where it is missing.

    Raises:
        InputError: the model has no graph, or the disk or the memory is too small for it.
    """

    def write(fresh: Path) -> None:
        request = msgspec.json.encode(GraphRequest(facts, depth, format, str(fresh))).decode()
        processes.output([MODULE, request], TIMEOUT_S, InputError)

    place = folder(facts, depth, format)
    once(place, write, TIMEOUT_S)
    return place


def folder(facts: Facts, depth: int, format: Weights) -> Path:
    """Where the graph of a slice is, once it is written."""
    # apart from the tokenizer's files, which exports copy: a lock lies beside each graph
    return Path(facts.folder) / "graphs" / f"{FORM}-{format}-{depth}"
