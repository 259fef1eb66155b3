"""NumPy and PyTorch, each imported where its first function is called.

An agent plans with the methods, and its process must load neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["np", "torch"]

if TYPE_CHECKING:
    import numpy as np
    import torch
else:

    class _Lazy:
        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    np, torch = _Lazy("numpy"), _Lazy("torch")
