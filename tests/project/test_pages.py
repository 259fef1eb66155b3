"""Pages and API reference build without a warning: no dead link, no docstring that cannot be read."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from edge_runtime import cli, errors, settings

ROOT = Path(__file__).parents[2]
TABLES = {  # of a fleet file, as its page names them
    "[fleet]": settings.Fleet,
    "[method]": settings.MethodChoice,
    "[adapter]": settings.Adapter,
    "[training]": settings.Training,
    "[head]": settings.Head,
    "[public]": settings.Public,
    "[codec]": settings.Codec,
    "[codistill]": settings.Codistill,
    "[[catalog]]": settings.Model,
}


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


def listed(page: str) -> dict[tuple[str, str], str]:
    """The default of each key in the page's table, by table and key."""
    defaults, table = {}, ""
    for words, default in re.findall(r"^\| `([^`{]+)` \| ([^|]+) \|", page, re.MULTILINE):
        *opened, key = words.split()
        table = opened[0] if opened else table
        defaults[table, key] = default.strip("`")
    return defaults


def test_the_page_of_the_fleet_file_lists_each_key_with_its_default():
    page = listed((ROOT / "docs" / "fleet.md").read_text(encoding="utf-8"))
    fields = {
        (table, field.encode_name): field
        for table, struct in TABLES.items()
        for field in msgspec.structs.fields(struct)
        if field.encode_name
        not in (
            "catalog",
            "method",
            "adapter",
            "training",
            "head",
            "public",
            "codec",
            "codistill",
            "settings",
        )
    }
    assert page.keys() == fields.keys()
    for key, field in fields.items():
        if re.match(r"[\d\[]", page[key]):
            default = ast.literal_eval(page[key])
            assert (tuple(default) if isinstance(default, list) else default) == field.default, key
        elif field.default in ("fedit", "nested"):
            assert page[key] == field.default, key


def test_a_key_that_the_page_lacks_is_noticed():
    page = (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")
    assert ("[training]", "steps") in listed(page)
    assert ("[training]", "steps") not in listed(page.replace("`[training] steps`", "`[training] stages`"))
    assert listed(page.replace("| `quorum` | 1 |", "| `quorum` | 2 |"))["[fleet]", "quorum"] == "2"


def missing(page: str) -> list[str]:
    """The Python files that a page names and that no folder of the project has."""
    folders = ("edge_runtime", "kernels", "broker", "device_profiles", "benchmarks", "examples", "tests")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = re.findall(r"`([\w/]+\.py)`", page)
    return [name for name in named if not any(path.endswith(f"/{name}") for path in files)]


def test_the_files_that_pages_name_are_there():
    pages = [
        ROOT / "CONTRIBUTING.md",
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
    assert {page.name: missing(page.read_text(encoding="utf-8")) for page in pages} == {
        page.name: [] for page in pages
    }
    assert missing("`errors.py` and `trainer/nothing.py`") == ["trainer/nothing.py"]  # the twin
