"""A state folder belongs to one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from edge_runtime.errors import InputError


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Lock the folder; the system unlocks it when the process ends, also when it is killed.

    Raises:
        InputError: another process has locked it.
    """
    state.mkdir(parents=True, exist_ok=True)
    # A lock of the system, not a file with a process id: nothing stale is left after a power cut.
    try:
        lock = FileLock(state / "lock").acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another process works in {state}: end it first, or give another --state"
        ) from error
    with lock:
        yield
