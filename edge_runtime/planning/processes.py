"""Runs processes that import torch for those that must not: to prepare a model, to measure.

What they print is read here; where they fail, their last line is the reason.
"""

import errno
import os
import signal
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec
from edge_broker import credentials, files

from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning.time import Rates
from edge_runtime.settings import Fleet

PREPARE_TIMEOUT_S = 3600.0  # a hub download may be gigabytes
MEASURE_TIMEOUT_S = 120.0
NOT_INSTALLED = (
    "the trainer's packages are not installed: in a clone of Edge Runtime, run pip install '.[agent]'"
)
NOT_SERVING = "the packages of the extra serve are not installed: in a clone of Edge Runtime, run pip install '.[serve]'"
TRAINER_ENVIRONMENT = {
    # Larger pieces go straight back to the system when freed; each costs page faults.
    "MALLOC_MMAP_THRESHOLD_": "8000000",
    # Else the heap's end goes back to the system with what was there: a fifth of a step.
    "MALLOC_TRIM_THRESHOLD_": "64000000",
    # One heap for all threads: with several, peaks differ by 50 MiB from run to run. And before
    # 2.38 glibc keeps what aligned blocks leave over in the two caches, and no block fits where it
    # was before.
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    # Else each new shape's kernel stays, some 50 MiB after ten steps.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "PYTHONIOENCODING": "utf-8",  # of what this process reads, whatever the locale
}


def cache_folder() -> Path:
    """Folder of prepared models and measurements: $EDGE_RUNTIME_CACHE, or in the user's cache.

    Raises:
        InputError: the user has no home folder, or may not write to the folder.
    """
    named = os.environ.get("EDGE_RUNTIME_CACHE")
    try:
        users = named or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(users) if named else Path(users, "edge-runtime")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable", str(folder))
    except (RuntimeError, OSError) as error:  # RuntimeError: neither HOME nor an entry in /etc/passwd
        raise InputError(
            f"there is no folder for prepared models and measurements: {str(error).rstrip('.')}; set EDGE_RUNTIME_CACHE to a "
            "folder that this user may write to"
        ) from error
    return folder


def prepared(source: str, models: Path, *, random_weights: bool = False) -> Facts:
    """Find or fetch a catalog's source, and read its facts; InputError has the process's reason.

    random_weights: as `edge_runtime.models.prepare` has it.
    """
    cache = cache_folder() / "models"
    command = ["edge_runtime.models.prepare", "--models", str(models), "--cache", str(cache)]
    command += ["--random-weights"] if random_weights else []
    return msgspec.json.decode(output([*command, "--", source], PREPARE_TIMEOUT_S, InputError), type=Facts)


def catalog_facts(fleet: Fleet, models: Path) -> dict[str, Facts]:
    """Facts of each source in the fleet's catalog; raises as `prepared` does."""
    return {source: prepared(source, models) for source in {model.source for model in fleet.catalog}}


def runtime_bytes() -> int:
    """Runtime baseline of this device, measured once in three seconds, and after each install."""
    return int(measured_once("baseline", ["edge_runtime.trainer", "--baseline"], EdgeError))


def onnx_bytes() -> int:
    """Baseline of a server in ONNX Runtime on this device, measured once in a second, and after each install."""
    return int(measured_once("baseline-onnx", ["edge_runtime.serving.baseline"], EdgeError))


def rates(device: str, threads: int = 0) -> Rates:
    """Rates of this device, measured once in two seconds, and after each install.

    device: "cpu" or "cuda". threads: of the trainer; 0 for torch's default. Raises InputError where
        torch cannot use the device.
    """
    written = measured_once(
        f"rates-{device}-{threads}", ["edge_runtime.planning.probe", device, str(threads)], InputError
    )
    return msgspec.json.decode(written, type=Rates)


def environment() -> dict[str, str]:
    """What a trainer process runs with; it has no use for the broker's password.

    A service's user may have no home folder, or one like / that the user may not write to. The
    libraries' caches, such as the hub's and Triton's, are then in ours.
    """
    variables = {**credentials.withhold(os.environ), **TRAINER_ENVIRONMENT}
    home = Path(os.path.expanduser("~"))
    if not os.access(home, os.W_OK) and not (home / ".cache").is_dir():
        variables["HOME"] = str(cache_folder().absolute())
    return variables


def installed(*more: str) -> bool:
    """Whether the packages of a trainer process are there, and more; a node does without them."""
    return all(find_spec(name) is not None for name in ("torch", "transformers", *more))


def measured_once(name: str, module: list[str], error: type[EdgeError]) -> bytes:
    """What the module prints, from the cache where these packages have printed it before."""
    if not installed():
        raise InputError(NOT_INSTALLED)
    changed = Path(sysconfig.get_path("purelib")).stat().st_mtime_ns
    cached = cache_folder() / f"{name}-{version('torch')}-{version('transformers')}-{changed:x}"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        measured = output(module, MEASURE_TIMEOUT_S, error)
        fresh = cached.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(measured)
        files.put(fresh, cached)
    return cached.read_bytes()


def output(
    module: list[str], timeout_s: float, error: type[EdgeError], variables: dict[str, str] | None = None
) -> bytes:
    """The output of `python -m module ...`; a failure raises `error` with stderr's last line.

    variables: the process's environment; None: a trainer's.
    """
    if not installed():
        raise InputError(NOT_INSTALLED)
    try:
        process = subprocess.run(
            [sys.executable, "-m", *module],
            capture_output=True,
            timeout=timeout_s,
            env=environment() if variables is None else variables,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as late:
        raise error(f"{module[0]} did not end within {timeout_s:.0f} s") from late
    if process.returncode == -signal.SIGKILL:
        raise error(f"{module[0]} was killed, most likely because the machine ran out of memory")
    if process.returncode != 0:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        raise error(lines[-1] if lines else f"{module[0]} ended with exit code {process.returncode}")
    return process.stdout
