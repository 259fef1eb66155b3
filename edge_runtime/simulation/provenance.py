"""What made a run: the machine, the libraries and this project's source."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import edge_broker
import edge_kernels

import edge_runtime


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@cache
def code() -> str:
    """Versions of the libraries that compute, and a digest of this project's source."""
    digest = hashlib.sha256()
    for package in (edge_broker, edge_kernels, edge_runtime):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"Python {platform.python_version()}, {libraries}, source {digest.hexdigest()[:8]}"
