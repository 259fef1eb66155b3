"""What `make setup` installs: the pins agree with what the pinned packages require, and pip's reasons are shown."""

import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PINS = (ROOT / "constraints.txt").read_text()
GLIBC = ("2_17", "2_24", "2_27", "2_28", "2_31", "2_34")  # wheel tags of the last years


@pytest.fixture(scope="module", params=["x86_64", "aarch64"])
def requirements(request, tmp_path_factory) -> dict[str, list[Requirement]]:
    """What each pinned package requires on Linux, by name: read from the package index, nothing is installed.

    `fast-deps` lets pip read the metadata out of a wheel without fetching the wheel.
    """
    if Version(version("pip")) < Version("23.3"):
        pytest.skip(f"pip {version('pip')} would fetch whole wheels; needs 23.3")
    folder = tmp_path_factory.mktemp(request.param)
    platforms = [f"--platform=manylinux_{glibc}_{request.param}" for glibc in GLIBC]
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    pip += ["--only-binary=:all:", "--use-feature=fast-deps", "--quiet", "--retries=1", "--timeout=20"]
    pip += [
        *platforms,
        f"--target={folder}",
        f"--report={folder}/report",
        f"--requirement={ROOT}/constraints.txt",
    ]
    # Builds of torch that this machine's own configuration prefers are left out: a newcomer has the usual index alone.
    environment = os.environ | {"PIP_FIND_LINKS": str(folder), "PIP_EXTRA_INDEX_URL": folder.as_uri()}
    finished = subprocess.run(pip, env=environment, capture_output=True, text=True)
    if finished.returncode and re.search("Retrying|[Cc]onnection", finished.stderr):
        pytest.skip("the package index cannot be reached")
    assert finished.returncode == 0, finished.stderr
    packages = [package["metadata"] for package in json.loads((folder / "report").read_text())["install"]]
    return {
        canonicalize_name(package["name"]): required_on_linux(package.get("requires_dist", []), request.param)
        for package in packages
    }


def required_on_linux(lines: list[str], machine: str) -> list[Requirement]:
    """The requirements that hold on such a machine with this Python, without extras."""
    environment = {
        "platform_system": "Linux",
        "sys_platform": "linux",
        "platform_machine": machine,
        "extra": "",
    }
    parsed = [Requirement(line) for line in lines]
    return [entry for entry in parsed if entry.marker is None or entry.marker.evaluate(environment)]


def pinned(text: str) -> dict[str, Version]:
    """The versions that a constraints file pins for this Python, by name."""
    parsed = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    applicable = [entry for entry in parsed if entry.marker is None or entry.marker.evaluate()]
    return {canonicalize_name(entry.name): Version(str(entry.specifier)[2:]) for entry in applicable}


def contradictions(text: str, requirements: dict[str, list[Requirement]]) -> list[str]:
    """Where a constraints file pins a version that one of the packages does not accept."""
    pins = pinned(text)
    return [
        f"{package} requires {entry}, constraints.txt pins {pins[canonicalize_name(entry.name)]}"
        for package, entries in requirements.items()
        for entry in entries
        if canonicalize_name(entry.name) in pins
        and not entry.specifier.contains(pins[canonicalize_name(entry.name)], prereleases=True)
    ]


def test_the_pins_agree_with_what_the_pinned_packages_require(requirements):
    assert set(requirements) == set(pinned(PINS))
    assert contradictions(PINS, requirements) == []


def test_what_torch_fixes_is_left_to_torch(requirements):
    exact = {canonicalize_name(entry.name) for entry in requirements["torch"] if "==" in str(entry.specifier)}
    assert "triton" in exact  # torch for Linux names the one triton that its compiler works with
    assert not exact & set(pinned(PINS))


def test_a_pin_that_torch_does_not_accept_is_noticed(requirements):  # the twin of the two above
    (reason,) = contradictions(PINS + "triton==3.9.0\n", requirements)
    assert re.fullmatch(r"torch requires triton==.*, constraints.txt pins 3\.9\.0", reason)


def test_a_contradiction_is_noticed_without_a_network():
    required = {"torch": required_on_linux(["triton==3.7.1; platform_system == 'Linux'"], platform.machine())}
    assert contradictions("triton==3.7.1\n", required) == []
    assert len(contradictions("triton==3.9.0\n", required)) == 1


def make(*arguments: str) -> str:
    """The commands that make would run for a new checkout."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_setup_says_how_much_it_fetches_before_it_starts():
    commands = make("setup")
    assert re.search(r"\d GB in all, .* on disk", commands[: commands.index("pip install")])


def test_pip_tells_its_reasons():
    assert "--quiet" not in make("setup", "test")


def test_another_index_for_torch_is_one_variable():
    assert "--extra-index-url" not in make("setup", "test")
    lines = make("setup", "test", "TORCH_INDEX=file:///cpu").splitlines()
    assert all("--extra-index-url file:///cpu" in line for line in lines if "pip install" in line)


def test_a_torch_without_cuda_is_taken_from_the_other_index(tmp_path):
    usual, other = (
        package_index(tmp_path / "usual", "2.13.0"),
        package_index(tmp_path / "other", "2.13.0+cpu"),
    )

    def fetched(*options: str) -> str:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            f"--index-url={usual}",
            *options,
        ]
        pip += [f"--constraint={ROOT}/constraints.txt", f"--dest={tmp_path}", "torch"]
        subprocess.run(
            pip, env=os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}, check=True
        )
        (file,) = tmp_path.glob("*.whl")
        file.unlink()
        return file.name.split("-")[1]

    assert fetched(f"--extra-index-url={other}") == "2.13.0+cpu"
    assert fetched() == "2.13.0"  # the twin: without the variable


def package_index(folder: Path, torch_version: str) -> str:
    """A package index that holds an empty torch of that version; returns its URL."""
    (folder / "torch").mkdir(parents=True)
    file = folder / "torch" / f"torch-{torch_version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        about = f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n"
        archive.writestr(f"torch-{torch_version}.dist-info/METADATA", about)
        archive.writestr(f"torch-{torch_version}.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    (folder / "torch" / "index.html").write_text(f'<a href="{file.name.replace("+", "%2B")}">{file.name}</a>')
    return folder.as_uri()
