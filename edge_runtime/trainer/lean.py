"""Imports transformers without what a trainer never uses: torch's compiler, 95 MiB of a process that has it, its distributed
tensors with the computer algebra they bring, 48 MiB, and packages that transformers takes up where it finds them: SciPy,
40 MiB, Pillow, accelerate and others.

transformers asks for torch._dynamo in two ways: it marks functions with decorators of it, which change nothing where nothing
is compiled, and it takes one class out of a module of its own. Both work with the package's folder alone, its start left
out. Distributed tensors it leaves out by itself with a torch that was built without them, as some of a Jetson's are, and
the other packages where they are not found.
Afterwards everything is as if it had not been imported: who really needs the compiler gets it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed

COMPILER = "torch._dynamo"
OPTIONAL = (
    "PIL",
    "accelerate",
    "scipy",
    "sklearn",
    "torchvision",
)  # what transformers imports beside language models


@contextmanager
def lean_imports() -> Iterator[None]:
    """While inside, torch's compiler is a package whose functions are decorators that do nothing, torch is not distributed,
    and the optional packages are not installed."""
    if COMPILER in sys.modules:  # too late to leave it out
        yield
        return
    package: Any = ModuleType(COMPILER)
    package.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    package.__getattr__ = _decorator
    sys.modules[COMPILER] = package
    hidden: dict[str, Any] = sys.modules
    absent = [name for name in OPTIONAL if name not in hidden]
    hidden.update(dict.fromkeys(absent))  # Python takes None for a package that is not there
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available
        for name in absent:
            del hidden[name]
        for name in [name for name in sys.modules if name == COMPILER or name.startswith(f"{COMPILER}.")]:
            del sys.modules[name]
        vars(torch).pop("_dynamo", None)


def _decorator(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else lambda inner: inner

    return mark
