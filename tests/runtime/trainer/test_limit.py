"""What a running round does when its steps come near the budget."""

import pytest

from edge_runtime.errors import MemoryShortError
from edge_runtime.protocol.plan import Plan
from edge_runtime.trainer.train import Limit

MIB = 1 << 20


def plan(size, rows):
    names = {"source": "m", "model_class": "m@1", "depth": 4, "layers": 4, "weights": "bfloat16", "rank": 4}
    return Plan(**names, rows=rows, tokens=32, terms={"all": size * MIB}, step_seconds=1.0)


FIRST, LOWER = plan(1000, 8), [plan(900, 4), plan(800, 2), plan(600, 1)]


def limit(*peaks, budget=1000, lower=LOWER):
    laps = iter(peaks)
    return Limit(budget * MIB, FIRST, lower, lambda: next(laps) * MIB)


def test_far_from_the_budget_nothing_changes():
    some = limit(100, 979, 500)
    assert [some.ease() for _ in range(3)] == [None] * 3


def test_near_it_the_next_plan_is_taken():
    some = limit(985, 890, 981)
    assert [some.ease() for _ in range(3)] == [LOWER[0], None, LOWER[1]]


def test_over_it_the_first_plan_that_takes_enough_less():
    assert limit(1180).ease() == LOWER[1]  # 200 MiB less than FIRST, and then near no more
    assert limit(1181).ease() == LOWER[2]


def test_near_it_with_nothing_left_it_goes_on():
    some = limit(990, 990, 990, 990, lower=LOWER[:1])
    assert [some.ease() for _ in range(3)] == [LOWER[0], None, None]


def test_over_it_with_nothing_that_would_do_it_stops_and_says_what_was_needed():
    with pytest.raises(
        MemoryShortError, match=r"a step took 1.46 GiB of a budget of 1000 MiB, and was to take 1000 MiB"
    ):
        limit(1500).ease()
    with pytest.raises(MemoryShortError):
        limit(1001, lower=[]).ease()
    assert MemoryShortError.exit_code == 6


def test_what_a_lower_plan_saves_is_counted_from_the_present_one():
    some = limit(985, 1070, lower=[plan(900, 4), plan(850, 2)])
    assert some.ease().rows == 4
    with pytest.raises(MemoryShortError, match="was to take 900 MiB"):
        some.ease()
