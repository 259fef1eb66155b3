"""Imports transformers' tokenizers without torch.

Libraries   transformers >= 5; tried with 5.23
Reason      transformers imports torch where it finds it, and torch costs a server in ONNX Runtime,
            which has no use for it, 185 MiB of 275
Change      sys.modules holds None for torch and Pillow while inside, and the note that torch was not
            found is not shown. transformers remembers for the process's life that there is no
            torch, so no model can be loaded afterwards.
Breaks      when transformers' tokenizers or chat templates need torch: an ImportError names it
Test        tests/runtime/compat/test_without_torch.py
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HIDDEN = ("torch", "PIL")


@contextmanager
def without_torch() -> Iterator[None]:
    """While inside, imports find no torch. Where transformers is imported already, nothing changes."""
    if "transformers" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in HIDDEN if name not in modules]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    modules.update(dict.fromkeys(hidden))  # None: Python reports the package as not installed
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]
