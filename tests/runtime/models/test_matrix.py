"""Every family in every variant is read as transformers reads it, or refused; the page has the table."""

import re

import pytest
import torch

from benchmarks import models
from benchmarks.model_cases import CASES, build, ids
from edge_runtime.models.families import FAMILIES


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("kinds", [["Q4_K"], [*models.FORMATS["GGUF"]]], ids=["short", "long"])
def test_every_variant_is_exact_or_refused_as_the_page_has_it(kinds, family, monkeypatch):
    formats = {kind: models.FORMATS["GGUF"][kind] for kind in kinds}
    monkeypatch.setitem(models.FORMATS, "GGUF", formats)
    row = models.markdown([family]).splitlines()[2]
    assert "wrong" not in row
    page = models.PAGE.read_text(encoding="utf-8").splitlines()
    numbers = re.compile(r" \(\d+\)")  # of the reasons, which other families have too
    assert numbers.sub("", row) in [numbers.sub("", line) for line in page]


def test_every_family_has_variants():
    assert list(CASES) == [row.types[0] for row in FAMILIES]


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
def test_every_variant_changes_what_is_computed(family):
    seen = [build(family, variant)(ids()).logits for variant in CASES[family].variants]
    apart = [(one - two).abs().max() for n, one in enumerate(seen) for two in seen[:n]]
    assert min(apart) > 10 * models.TOLERANCE


def test_the_table_sees_a_model_that_is_another(tmp_path, monkeypatch):
    def other(model, _):
        model.lm_head.weight[5, 5] += 0.01
        return model

    monkeypatch.setitem(models.FORMATS, "other", {"": models.Format(models.save_folder, other)})
    assert models.outcome("llama", "untied", "other", tmp_path).startswith("wrong: 0.0")
