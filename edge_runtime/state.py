"""State folders: whose they are and who wrote them; files that several processes may want at once."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from edge_broker.files import put
from edge_broker.store import connect
from filelock import FileLock, Timeout

from edge_runtime.errors import InputError

# Format of a state folder, raised when a version cannot read what the version before wrote.
FORMAT = 2
# of an agent's state: the folder of the newest adapter (adapters/learned.py), and the file in such
# a folder that names its version
NEWEST, ABOUT = "adapter", "edge_runtime.json"
# in a scratch folder: its lock, and the file that says whose folder it is
LOCK, MARK = "lock", "edge-runtime.scratch"


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Lock a state folder; the system unlocks it when this process ends, also when it is killed.

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


def database(path: Path) -> sqlite3.Connection:
    """Open the database of a state folder; Path(":memory:") has none.

    Raises:
        InputError: a version of Edge Runtime that has another format wrote it.
    """
    connection = connect(path)
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (written,) = connection.execute("PRAGMA user_version").fetchone()
    if tables and written != FORMAT:
        connection.close()
        raise InputError(
            f"{path.parent} was written by a version of Edge Runtime with format {written}, and this one has "
            f"format {FORMAT}: finish with that version, or start anew with another --state"
        )
    # before the first table: a process killed between them leaves a database of this format
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    return connection


def once(path: Path, make: Callable[[Path], object], timeout_s: float = 600.0) -> None:
    """Make a file or folder unless it is there; other processes wait until it is made.

    make: writes the file or folder to the path that it is given, in a scratch folder.

    Raises:
        Timeout: another process has been making it for so long.
    """
    scratch = Path(f"{path}.part")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=timeout_s):
        if not path.exists():
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            scratch.mkdir()
            try:
                make(scratch / path.name)
                put(scratch / path.name, path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A folder PLACE.RANDOM.part while inside, for what gets the name of the place in the end.

    Its process holds a lock, which the system takes from a process that is killed. So the next
    process that comes here removes what killed ones have left.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for folder in place.parent.glob("*.part"):
        _remove_if_left(folder)
    with (
        TemporaryDirectory(prefix=f"{place.name}.", suffix=".part", dir=place.parent) as name,
        FileLock(Path(name) / LOCK),
    ):
        (Path(name) / MARK).touch()  # with the lock held: no process takes the folder for one that was left
        yield Path(name)


def _remove_if_left(folder: Path) -> None:
    """Remove a scratch folder whose process was killed; a folder of anybody else has no mark."""
    # another user's folder stays
    with suppress(Timeout, OSError):
        if (folder / MARK).exists():
            with FileLock(folder / LOCK, timeout=0):
                shutil.rmtree(folder)


def stamp(adapter: Path) -> tuple[int, int]:
    """Differs whenever an adapter's folder was replaced; zeros while there is none."""
    try:
        status = (adapter / ABOUT).stat()
    except OSError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def version_of(adapter: Path) -> int | None:
    """The version in an adapter's folder; None while there is none."""
    try:
        return msgspec.json.decode((adapter / ABOUT).read_bytes(), type=_About).version
    except OSError:
        return None


class _About(msgspec.Struct):
    version: int
