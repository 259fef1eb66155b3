"""The backends of serving by name."""

from edge_runtime.adapters.learned import Learned
from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.serving.engine import Engine
from edge_runtime.settings import Backend, Weights
from edge_runtime.trainer.job import Machine


def load(
    backend: Backend, facts: Facts, learned: Learned | None, weights: Weights, machine: Machine
) -> Engine:
    """Load a base model with its first adapter; None: the whole checkpoint without one.

    A process with the backend onnx does without torch, which is most of its memory.

    Raises:
        InputError: the backend cannot use the device, or as its engine does.
    """
    if backend == "torch":
        with lean_imports():
            from edge_runtime.serving.torch_engine import TorchEngine
            from edge_runtime.trainer import meter

        meter.prepare(machine)
        return TorchEngine(facts, learned, weights, machine.device)
    if machine.device != "cpu":
        raise InputError(
            f"the backend onnx computes on the CPU, but the device is {machine.device}: give --device cpu, or "
            "--backend torch"
        )
    from edge_runtime.serving.onnx_engine import OnnxEngine

    return OnnxEngine(facts, learned, weights, machine.threads)
