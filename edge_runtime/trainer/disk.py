"""Writes files whole or not at all, and waits while the disk is full, to save a trained round."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from edge_broker import files
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_runtime.errors import DiskError, InputError

WAIT_S, POLL_S = 600.0, 5.0

Tensors: TypeAlias = dict[str, NDArray[np.float32]]
Tell = Callable[[str], object]  # receives the phase "wait for disk space" at each failed attempt


def save(path: Path, content: Tensors | bytes, tell: Tell) -> None:
    """Write bytes, or tensors as safetensors.

    Raises:
        DiskError: the disk stayed full for WAIT_S.
        OSError: any other failure to write.
    """
    partial = path.with_suffix(".part")

    def write() -> None:
        try:
            if isinstance(content, bytes):
                partial.write_bytes(content)
            else:
                save_file({key: np.ascontiguousarray(value) for key, value in content.items()}, partial)
            files.put(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    patiently(write, path.parent, tell)


def patiently(write: Callable[[], None], folder: Path, tell: Tell) -> None:
    """Write to a folder, again and again while its disk is full; raises as `save` does."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            write()
            return
        except (OSError, SafetensorError) as error:
            # safetensors reports a system error only as text
            if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
                raise
            if time.monotonic() > deadline:
                raise DiskError(f"{folder} is on a disk that has been full for {WAIT_S:.0f} s") from error
            tell("wait for disk space")
            time.sleep(POLL_S)


def load(path: str) -> Tensors:
    """Read tensors that an earlier round left; raises InputError if the file cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}, which an earlier round left, cannot be read: {error}; start with a new --state"
        ) from error
