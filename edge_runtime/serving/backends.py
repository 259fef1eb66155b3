"""The backends of serving by name."""

from typing import Literal

from edge_runtime.adapters.learned import Learned
from edge_runtime.models.facts import Facts
from edge_runtime.serving.engine import Engine
from edge_runtime.serving.torch_engine import TorchEngine
from edge_runtime.settings import Weights

Backend = Literal["torch"]


def load(backend: Backend, facts: Facts, learned: Learned | None, weights: Weights, device: str) -> Engine:
    """Load a base model with its first adapter; arguments and errors as TorchEngine has them."""
    return TorchEngine(facts, learned, weights, device)
