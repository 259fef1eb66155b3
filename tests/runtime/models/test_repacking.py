"""The page's table of what a GGUF file's matrices lose in another format is what is measured."""

import re

from benchmarks import models, repacking


def test_the_page_has_the_errors_that_are_measured():
    page = models.PAGE.read_text(encoding="utf-8").splitlines()
    for line in repacking.markdown().splitlines()[2:]:
        name, *seen = figures(line)
        found = [row for row in map(figures, page) if row[0] == name]
        assert len(found) == 1 and len(found[0]) == 1 + len(seen)
        for ours, measured in zip(found[0][1:], seen, strict=True):
            assert ours == measured or abs(float(ours) - float(measured)) <= 0.1


def figures(line):
    """The cells of a line, of errors the number alone."""
    return [re.sub(r" %$", "", cell.strip()) for cell in line.strip("|").split("|")]


def test_a_format_is_kept_and_others_are_near():
    assert repacking.error("Q4_1", "q4_1") == 0
    assert 0 < repacking.error("Q4_K", "q8_0") < 0.01 < repacking.error("Q4_K", "q4_0") < 0.12
