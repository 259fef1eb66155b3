"""When to ask again."""

import random

IDLE_S = 60.0  # what tick returns when nothing is due
_FIRST_S, _LARGEST_S = 2.0, 60.0


def retry_s(tries: int) -> float:
    """The wait after so many unanswered tries: 2 s doubling to 60 s, give or take a quarter."""
    # random, so that devices do not ask in step
    return min(_LARGEST_S, _FIRST_S * 2 ** min(tries, 10)) * random.uniform(0.75, 1.25)
