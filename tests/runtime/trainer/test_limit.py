"""What a running round does when its steps come near the budget."""

import pytest

from edge_runtime.errors import MemoryShortError
from edge_runtime.protocol.plan import Plan
from edge_runtime.trainer.train import eased

MIB = 1 << 20


def plan(size, rows):
    names = {"source": "m", "model_class": "m@1", "depth": 4, "layers": 4, "weights": "bfloat16", "rank": 4}
    return Plan(**names, rows=rows, tokens=32, terms={"all": size * MIB}, step_seconds=1.0)


FIRST, LOWER = plan(1000, 8), [plan(900, 4), plan(800, 2), plan(600, 1)]


def followed(*peaks, budget=1000, lower=LOWER):
    """The plan after each step, of steps with these peaks in MiB."""
    plans, seen = [FIRST, *lower], []
    for peak in peaks:
        plans = eased(plans, peak * MIB, budget * MIB)
        seen.append(plans[0])
    return seen


def test_far_from_the_budget_nothing_changes():
    assert followed(100, 979, 500) == [FIRST] * 3


def test_near_it_the_next_plan_is_taken():
    assert followed(985, 890, 981) == [LOWER[0], LOWER[0], LOWER[1]]


def test_over_it_the_first_plan_that_takes_enough_less():
    assert followed(1180) == [LOWER[1]]  # 200 MiB less than FIRST, and then near no more
    assert followed(1181) == [LOWER[2]]


def test_near_it_with_nothing_left_it_goes_on():
    assert followed(990, 990, 990, lower=LOWER[:1]) == [LOWER[0]] * 3


def test_over_it_with_nothing_that_would_do_it_stops_and_says_what_was_needed():
    with pytest.raises(
        MemoryShortError, match=r"a step took 1.46 GiB of a budget of 1000 MiB, and was to take 1000 MiB"
    ):
        followed(1500)
    with pytest.raises(MemoryShortError):
        followed(1001, lower=[])
    assert MemoryShortError.exit_code == 6


def test_what_a_lower_plan_saves_is_counted_from_the_present_one():
    lower = [plan(900, 4), plan(850, 2)]
    assert followed(985, lower=lower) == lower[:1]
    with pytest.raises(MemoryShortError, match="was to take 900 MiB"):
        followed(985, 1070, lower=lower)
