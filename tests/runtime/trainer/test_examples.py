"""Examples in a file, and the order in which rows come."""

from itertools import islice

import pytest

from edge_runtime.errors import InputError
from edge_runtime.trainer.examples import (
    IGNORED,
    SORTED,
    Example,
    Examples,
    batches,
    drawn,
    epochs,
    order_of,
)


def examples(lengths):
    return [Example([n] * length, [n] * length) for n, length in enumerate(lengths)]


def test_examples_in_a_file_are_those_that_were_put_there(tmp_path):
    rows = [Example([1, 300_000], [IGNORED, 300_000]), Example([7] * 600, [], 3), Example([2], [2])]
    stored = Examples(9, [0, 4, 8], iter(rows), tmp_path)
    assert len(stored) == 9
    assert [stored[number] for number in (8, 0, 4, 0)] == [rows[2], rows[0], rows[1], rows[0]]
    assert [*Examples(3, range(3), rows, tmp_path)] == rows
    assert not list(tmp_path.iterdir())  # rows are private: nothing is left behind


@pytest.mark.parametrize("number", [-1, 1, 5, 8])
def test_a_row_that_was_not_written_gives_no_other_row(number, tmp_path):
    stored = Examples(9, [0, 4, 7], examples([1, 2, 3]), tmp_path)
    assert len(stored[7].ids) == 3
    with pytest.raises(IndexError, match=f"the example of row {number} was not written"):
        stored[number]


def test_a_file_of_rows_that_has_become_shorter_is_refused(tmp_path):
    with pytest.raises(InputError, match="has become shorter while it was read"):
        Examples(3, range(3), examples([1, 2]), tmp_path)


def test_batches_hold_every_example_once_and_alike_lengths_together():
    given = examples([5, 30, 4, 29, 6, 28, 3])
    grouped = list(batches(given, 3))
    assert [sorted(len(one.ids) for one in group) for group in grouped] == [[3, 4, 5], [6, 28, 29], [30]]
    assert sorted(one for group in grouped for one in group) == sorted(given)


def test_batches_hold_examples_of_one_kind():
    given = [example._replace(answer=0) if n % 2 else example for n, example in enumerate(examples([1] * 5))]
    assert [[example.headed for example in batch] for batch in batches(given, 2)] == [
        [False, False],
        [False],
        [True, True],
    ]


def test_so_many_examples_that_not_all_are_sorted_at_once_are_batched_too():
    given = examples([n % 7 + 1 for n in range(SORTED + 10)])
    grouped = list(batches(given, 64))
    assert sorted(example for batch in grouped for example in batch) == sorted(given)
    assert sum(len({len(example.ids) for example in batch}) > 1 for batch in grouped) <= 7


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    given = examples([1] * 20)
    taken = list(islice(epochs(given, "0/1"), 60))
    passes = [taken[:20], taken[20:40], taken[40:]]
    assert all(sorted(one) == sorted(given) for one in passes)
    assert passes[0] != passes[1] != passes[2] != given
    assert taken == list(islice(epochs(given, "0/1"), 60))
    assert taken != list(islice(epochs(given, "0/2"), 60))


def test_rounds_of_a_fleet_have_orders_of_their_own():
    orders = {tuple(islice(drawn(50, order_of(seed, round_)), 50)) for seed in (0, 1) for round_ in (1, 2)}
    assert len(orders) == 4
