"""What the wheel holds, as it is built from the project's own files."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("edge_runtime", "edge_kernels", "edge_broker", "edge_profiles")


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> list[str]:
    """Paths inside the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    built = subprocess.run(build, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("the build needs hatchling, and no package index is reached")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_the_four_packages_and_nothing_else(names):
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_type_checkers_may_read_the_packages(names):
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


def test_files_that_are_no_python_are_there(names):
    assert {"edge_runtime/demo/fleet.toml", "edge_runtime/demo/commands.toml"} <= set(names)
    assert any(name.startswith("edge_profiles/boards/") and name.endswith(".toml") for name in names)
