"""The comparison of a tool with the trainer: a lost adapter is seen where rounding is larger than its change."""

import numpy as np
import pytest

from edge_runtime.adapters.export import check
from edge_runtime.adapters.export.check import Outputs
from edge_runtime.errors import EdgeError


def outputs(share, size):
    """The trainer's outputs, and a tool's with rounding of 1 % and this share of the adapter's change."""
    draw = np.random.default_rng(0)
    plain, change, rounding = draw.normal(size=(3, 3, 500)).astype(np.float32)
    truth, rounded = Outputs(plain, plain + size * change), plain + 0.01 * rounding
    return Outputs(rounded, rounded + share * size * change), truth


@pytest.mark.parametrize("size", [0.005, 0.002])
def test_an_adapter_is_lost_or_there_whatever_rounding_does(size):
    check.require(*outputs(1.0, size), 0.3, "a tool")
    check.require(*outputs(0.6, size), 0.3, "a tool")
    for share in (0.0, 0.4, -1.0):
        with pytest.raises(EdgeError, match="of what the adapter changes"):
            check.require(*outputs(share, size), 0.3, "a tool")


def test_a_change_too_small_to_count_is_not_looked_for():
    check.require(*outputs(0.0, 0.0005), 0.3, "a tool")


def test_a_missing_value_is_refused():
    seen, truth = outputs(1.0, 0.002)
    seen.adapted[0, 0] = np.nan
    with pytest.raises(EdgeError):
        check.require(seen, truth, 0.3, "a tool")
