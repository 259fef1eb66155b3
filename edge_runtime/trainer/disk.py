"""Writes files whole or not at all, and waits while the disk is full, to save a trained round."""

import errno
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from edge_broker import files
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_runtime.errors import DiskError, InputError

WAIT_S, POLL_S = 600.0, 5.0

Tell = Callable[[str], object]  # receives the phase "wait for disk space" at each failed attempt


def save(path: Path, tensors: Mapping[str, NDArray[np.float32]], tell: Tell) -> None:
    """Write tensors as safetensors; raises as replace does."""
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    _write(lambda partial: save_file(contiguous, partial), path, tell)


def replace(path: Path, content: bytes, tell: Tell) -> None:
    """Write bytes.

    Raises:
        DiskError: the disk stayed full for WAIT_S.
        OSError: any other failure to write.
    """
    _write(lambda partial: partial.write_bytes(content), path, tell)


def load(path: str) -> dict[str, NDArray[np.float32]]:
    """Read tensors that an earlier round left; raises InputError if the file cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}, which an earlier round left, cannot be read: {error}; start with a new --state"
        ) from error


def _write(write: Callable[[Path], object], path: Path, tell: Tell) -> None:
    partial, deadline = path.with_suffix(".part"), time.monotonic() + WAIT_S
    while True:
        try:
            write(partial)
            files.put(partial, path)
            return
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if not _disk_full(error):
                raise
            if time.monotonic() > deadline:
                raise DiskError(
                    f"{path.parent} is on a disk that has been full for {WAIT_S:.0f} s"
                ) from error
            tell("wait for disk space")
            time.sleep(POLL_S)


def _disk_full(error: Exception) -> bool:
    # safetensors reports a system error only as text
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
