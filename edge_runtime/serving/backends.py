"""The backends of serving by name."""

from typing import Literal

from edge_runtime.adapters.learned import Learned
from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.serving.engine import Engine
from edge_runtime.settings import Weights
from edge_runtime.trainer.job import Machine

Backend = Literal["torch", "onnx"]


def load(
    backend: Backend, facts: Facts, learned: Learned | None, weights: Weights, machine: Machine
) -> Engine:
    """Load a base model with its first adapter; None: the whole checkpoint without one.

    Raises:
        InputError: the backend cannot use the device, or as its engine does.
    """
    if backend == "torch":
        with lean_imports():
            from edge_runtime.serving.torch_engine import TorchEngine

        return TorchEngine(facts, learned, weights, machine.device)
    if machine.device != "cpu":
        raise InputError(
            f"the backend onnx computes on the CPU, but the device is {machine.device}: give --device cpu, or "
            "--backend torch"
        )
    from edge_runtime.serving.onnx_engine import OnnxEngine

    return OnnxEngine(facts, learned, weights, machine.threads)
