"""Lets transformers read a GGUF file's configuration and tokenizer in less memory.

Libraries   gguf >= 0.17, transformers >= 5; tried with gguf 0.19 and transformers 5.23
Reason      gguf's reader keeps four arrays a token, each a view of a memory map that takes a
            kilobyte; plain arrays take 620 MiB in place of 970 for 262,144 tokens
Change      gguf.GGUFReader, which transformers looks up when it reads a file, is a subclass
Breaks      when the reader keeps no map of its own, or transformers imports the class earlier: files
            are still read, in the memory of before
Test        tests/runtime/models/test_prepare.py: the memory that preparing the demo's model takes
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np


class _PlainReader(gguf.GGUFReader):
    """Makes a plain array of the memory map, so that every slice of it is plain too."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)


@contextmanager
def plain_reader() -> Iterator[None]:
    """While inside, transformers reads GGUF files by plain arrays."""
    usual = gguf.GGUFReader
    gguf.GGUFReader = _PlainReader
    try:
        yield
    finally:
        gguf.GGUFReader = usual
