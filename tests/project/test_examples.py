"""Each example has a page that calls its script; tests/system/test_pages_commands.py runs the pages."""

from pathlib import Path

import pytest
from edge_profiles import board, default_budget_bytes, format_size, profile_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*/run.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_an_examples_page_calls_its_script(script: Path):
    page = (script.parent / "README.md").read_text(encoding="utf-8")
    assert f"\nbash examples/{script.parent.name}/run.sh" in page


def test_the_page_of_examples_has_each():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) == 3
    assert all(f"({script.parent.name}/README.md)" in page for script in SCRIPTS)


def test_the_page_of_budgets_has_what_the_system_leaves_of_the_board():
    page = (EXAMPLES / "fit-a-board" / "README.md").read_text(encoding="utf-8")
    budget = default_budget_bytes(profile_of(board("jetson-orin-nano-8gb")))
    assert f"of a budget of {format_size(budget)}," in page and format_size(budget).startswith("4.8")
