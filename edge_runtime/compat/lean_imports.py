"""Imports transformers without packages that a trainer never uses.

Libraries   torch >= 2.8, transformers >= 5; tried with torch 2.13 and transformers 5.23
Reason      torch's compiler costs a process 95 MiB, distributed tensors and SymPy 48 MiB, SciPy
            40 MiB; transformers imports Pillow, accelerate and others where it finds them
Change      sys.modules holds an empty torch._dynamo, and None for the optional packages;
            torch.distributed.is_available says no. All of it is undone at the end.
Breaks      when transformers calls torch._dynamo at import for more than decorators and one class
            of its submodules: the import then fails with an AttributeError or ImportError
Test        tests/runtime/compat/test_lean_imports.py
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
# not needed for language models
OPTIONAL = ("PIL", "accelerate", "scipy", "sklearn", "torchvision")


@contextmanager
def lean_imports() -> Iterator[None]:
    """While inside, imports find no compiler, no distributed tensors and no optional packages.

    Afterwards each of them can be imported as usual. Where the compiler is imported already,
    nothing changes.
    """
    # only here: a process that finds what it needs in the cache does without torch
    import torch
    import torch.distributed

    if COMPILER in sys.modules:
        yield
        return
    compiler: Any = ModuleType(COMPILER)
    # transformers takes one class out of a submodule, which can be imported by this path
    compiler.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    compiler.__getattr__ = _decorator
    modules: dict[str, Any] = sys.modules
    modules[COMPILER] = compiler
    hidden = [name for name in OPTIONAL if name not in modules]
    # None: Python reports the package as not installed
    modules.update(dict.fromkeys(hidden))
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        for name in [*hidden, *(name for name in modules if f"{name}.".startswith(f"{COMPILER}."))]:
            del modules[name]
        vars(torch).pop("_dynamo", None)


def _decorator(name: str) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    if name.startswith("__"):
        raise AttributeError(name)

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else lambda inner: inner

    return mark
