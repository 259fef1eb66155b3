"""Files and folders that several processes may want at once."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_broker.files import put
from filelock import FileLock, Timeout

from edge_runtime.errors import InputError


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Lock a state folder for this process; the system unlocks it when the process ends, also when it is killed.

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


def once(path: Path, make: Callable[[Path], object], timeout_s: float = 600.0) -> None:
    """Make a file or folder unless it is there; other processes wait until it is made.

    make: writes it under the path that it is given, in a scratch folder.

    Raises:
        Timeout: another process has been making it for so long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=timeout_s):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                fresh = Path(scratch) / path.name
                make(fresh)
                put(fresh, path)
