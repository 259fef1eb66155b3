"""Budgets of the demo's devices: another size of the model for each, on every machine."""

from pathlib import Path

import pytest
from architectures import RATES, SMOLLM2

from edge_runtime import settings
from edge_runtime.demo import run
from edge_runtime.demo.commands import DOMAINS
from edge_runtime.planning.search import choose

MIB = 1 << 20


def depths(runtime_mib: int, method: str = "fedit", difference_mib: int = 0) -> list[int]:
    """The depth that each device's planner chooses, with budgets that are off by so much."""
    fleet = settings.load(run.FLEET)
    fleet = settings.parse(
        {
            "fleet": {"name": fleet.name},
            "method": {"name": method},
            "adapter": {"rank": fleet.adapter.rank},
            "training": {"rows_a_step": fleet.training.rows_a_step, "max_tokens": fleet.training.max_tokens},
            "catalog": [
                {"source": model.source, "depth": model.depth, "weights": model.weights}
                for model in fleet.catalog
            ],
        }
    )
    facts = {model.source: SMOLLM2 for model in fleet.catalog}
    budgets = run.budgets_bytes(fleet, facts, runtime_mib * MIB, RATES)
    assert tuple(budgets) == tuple(DOMAINS)
    return [
        choose(fleet, facts, budget + difference_mib * MIB, runtime_mib * MIB, RATES).fits.depth
        for budget in budgets.values()
    ]


@pytest.mark.parametrize("runtime_mib", [200, 250, 297, 350, 400, 450, 500])
@pytest.mark.parametrize("method", ["fedit", "local", "flora"])
def test_each_device_trains_another_size(runtime_mib: int, method: str) -> None:
    assert depths(runtime_mib, method) == [30, 20, 10]


def test_a_budget_is_far_from_both_sizes() -> None:
    """A runtime that takes somewhat more or less than was measured changes no size; much more does."""
    assert depths(297, difference_mib=30) == depths(297, difference_mib=-30) == [30, 20, 10]
    assert depths(297, difference_mib=60) != [30, 20, 10]


def test_the_demos_fleet_is_one_checkpoint_in_as_many_sizes_as_there_are_devices() -> None:
    fleet = settings.load(Path(run.FLEET))
    assert [model.depth for model in fleet.catalog] == [30, 20, 10]
    assert len({model.source for model in fleet.catalog}) == 1
