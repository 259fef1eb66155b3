"""Pages and API reference build without a warning: no dead link, no docstring that cannot be read."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from edge_runtime import cli, errors

ROOT = Path(__file__).parents[2]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


def test_the_pages_build_without_a_warning(tmp_path):
    built = build(ROOT, tmp_path)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "reference" / "edge_kernels" / "index.html").read_text(encoding="utf-8")
    assert "rms_norm" in reference and "Normalise" in reference


def test_a_dead_link_is_found(tmp_path):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (root / "mkdocs.yml").write_text(settings, encoding="utf-8")
    (root / "docs" / "index.md").write_text("[nowhere](nowhere.md)\n", encoding="utf-8")
    for package in ("kernels", "broker", "device_profiles"):
        (root / package).mkdir()
    built = build(root, tmp_path / "site")
    assert built.returncode != 0 and "nowhere.md" in built.stderr
    shutil.rmtree(root)


def codes(table: str) -> set[int]:
    """The exit codes that a page lists, each in a row of its own."""
    return {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}


def raised() -> set[int]:
    """The exit codes that a command can end with: of every error, and those of no error."""
    kinds = [errors.EdgeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.exit_code for kind in kinds} | {0, cli.INTERRUPTED}


def test_the_page_of_exit_codes_lists_each_code_once():
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    assert codes(page) == raised()
    assert len(re.findall(r"^\| \d+ \|", page, re.MULTILINE)) == len(raised())
    assert codes(page.replace("| 7 |", "| 8 |")) != raised()  # the twin


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
