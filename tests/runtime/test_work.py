"""Which slices a device trains in turn."""

import pytest

from edge_runtime.agent import work
from edge_runtime.planning.plan import Plan
from edge_runtime.settings import Fleet, Model, Training

CATALOG = (Model("a"), Model("a", depth=20), Model("b", depth=15), Model("a", depth=10))


@pytest.mark.parametrize(
    ("source", "depth", "slices", "depths"),
    [
        ("a", 30, "nested", (30, 20, 10)),
        ("a", 20, "nested", (20, 10)),
        ("a", 10, "nested", (10,)),
        ("b", 15, "nested", (15,)),
        ("a", 30, "own", (30,)),
    ],
)
def test_a_device_trains_the_smaller_slices_of_its_checkpoint(source, depth, slices, depths):
    fleet = Fleet("f", CATALOG, training=Training(slices=slices))
    plan = Plan(source, "class", depth, 30, "float32", rank=4, rows=1, tokens=8, terms={}, step_seconds=1.0)
    assert work.depths(fleet, plan) == depths
