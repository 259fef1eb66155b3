"""What each installation can run: packages of other extras are not there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", text)[0] for text in requirements}


def required(extra: str | None) -> list[str]:
    """What an extra asks for, with what the extras in it ask for."""
    lines = EXTRAS.get(extra, [])
    inner = [
        line.partition("[")[2].rstrip("]").split(",") for line in lines if line.startswith("edge-runtime[")
    ]
    return [*lines, *(line for extras in inner for name in extras for line in required(name))]


def imported_without(missing: set[str], *modules: str) -> "subprocess.CompletedProcess[str]":
    """Import the modules in a process that lacks these packages."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in sorted(missing))]
    code = "\n".join([*lines, *(f"import {module}" for module in modules)])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        (
            None,
            (
                "edge_runtime.cli",
                "edge_runtime.cli.views",
                "edge_runtime.protocol.status",
                "edge_broker.local",
            ),
        ),
        ("aggregator", ("edge_runtime.cli", "edge_runtime.aggregator.node", "edge_runtime.state")),
        ("agent", ("edge_runtime.agent.agent", "edge_runtime.state", "edge_runtime.trainer.__main__")),
        ("serve", ("edge_runtime.serving.process", "edge_runtime.serving.onnx_engine")),
    ],
)
def test_an_extra_brings_all_that_its_commands_import(extra: str | None, modules: tuple[str, ...]) -> None:
    present = names(PROJECT["dependencies"]) | names(required(extra))
    missing = (
        set().union(*(names(requirements) for requirements in EXTRAS.values())) - present - {"edge-runtime"}
    )
    answer = imported_without(missing, *modules)
    assert answer.returncode == 0, answer.stderr


def test_a_package_that_is_missing_would_be_seen() -> None:
    assert imported_without({"filelock"}, "edge_runtime.state").returncode != 0
