"""Commands that messages and pages tell people to run."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
TEXTS = [
    path
    for pattern in (
        "edge_runtime/**/*.py",
        "*/edge_*/**/*.py",
        "benchmarks/**/*.py",
        "docs/**/*.md",
        "*.md",
        "*/README.md",
    )
    for path in ROOT.glob(pattern)
]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
INSTALL = re.compile(r"pip install (?:--?[\w-]+ )*'?([^\s'`\"]+)")


def impossible(text: str) -> list[str]:
    """What a text tells people to install of this project that pip cannot: it is on no index, so only a clone is."""
    bad = []
    for target in INSTALL.findall(text):
        name, _, extras = target.rstrip("]").partition("[")
        if re.fullmatch(r"edge[-_.](runtime|kernels|broker|profiles)\b.*", name, re.IGNORECASE):
            bad.append(target)
        if name == "." and not set(filter(None, extras.split(","))) <= EXTRAS:
            bad.append(target)
    return bad


def test_no_message_and_no_page_names_an_install_that_cannot_work() -> None:
    told = [INSTALL.search(path.read_text(encoding="utf-8")) is not None for path in TEXTS]
    assert sum(told) >= 4  # the search finds those that are good
    bad = {str(path): targets for path in TEXTS if (targets := impossible(path.read_text(encoding="utf-8")))}
    assert not bad


@pytest.mark.parametrize(
    "text",
    ["pip install 'edge-runtime[agent]'", "`pip install edge_runtime`", "pip install --quiet '.[trainer]'"],
)
def test_such_an_install_is_found(text: str) -> None:
    assert impossible(text)
