"""Imports transformers without torch's compiler, which a trainer never uses and which is 95 MiB of a process that has it.

transformers asks for torch._dynamo in two ways: it marks functions with decorators of it, which change nothing where nothing
is compiled, and it takes one class out of a module of its own. Both work with the package's folder alone, its start left
out. Afterwards everything is as if it had not been imported: who really needs the compiler gets it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


@contextmanager
def without_compiler() -> Iterator[None]:
    """While inside, importing torch's compiler gives a package whose functions are decorators that do nothing."""
    if NAME in sys.modules:  # too late to leave it out
        yield
        return
    package: Any = ModuleType(NAME)
    package.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    package.__getattr__ = _decorator
    sys.modules[NAME] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]:
            del sys.modules[name]
        vars(torch).pop("_dynamo", None)


def _decorator(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else lambda inner: inner

    return mark
