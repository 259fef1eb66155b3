"""Examples in a file, and the order in which rows come."""

from itertools import islice

import pytest

from edge_runtime.trainer.examples import (
    IGNORED,
    SORTED,
    Example,
    Examples,
    batches,
    epochs,
    first_rows,
    order_of,
)


def examples(lengths):
    return [Example([n] * length, [n] * length) for n, length in enumerate(lengths)]


def test_examples_in_a_file_are_those_that_were_put_there(tmp_path):
    rows = [Example([1, 300_000], [IGNORED, 300_000]), Example([7] * 600, [], 3), Example([2], [2])]
    stored = Examples(9, zip([0, 4, 8], rows, strict=True), tmp_path)
    assert len(stored) == 3 and stored.count == 9 and [*stored] == rows
    assert [stored[place] for place in (2, 0, 1, 0)] == [rows[2], rows[0], rows[1], rows[0]]
    assert not list(tmp_path.iterdir())  # rows are private: nothing is left behind


def test_a_row_that_has_no_example_has_no_place(tmp_path):
    stored = Examples(9, zip([0, 4, 7], examples([1, 2, 3]), strict=True), tmp_path)
    assert [stored.place(number) for number in range(-1, 9)] == [
        *(None, 0, None, None, None),
        *(1, None, None, 2, None),
    ]
    for place in (-1, 3):
        with pytest.raises(IndexError, match=f"there is no example {place}, but 3"):
            stored[place]


@pytest.mark.parametrize("missing", [(), (3,), (0, 1, 8)])
def test_a_pass_keeps_the_order_of_all_rows_without_those_that_have_no_example(missing, tmp_path):
    given = examples([1] * 9)
    stored = Examples(9, ((n, row) for n, row in enumerate(given) if n not in missing), tmp_path)
    left = len(given) - len(missing)
    taken, of_all = list(islice(epochs(stored, "0/1"), 3 * left)), list(islice(epochs(given, "0/1"), 27))
    assert taken[:left] == [row for row in of_all[:9] if row.ids[0] not in missing]
    for begin in (left, 2 * left):
        assert sorted(taken[begin : begin + left]) == sorted(taken[:left])
    assert missing or taken == of_all


def test_a_round_needs_examples_of_its_first_rows_alone(tmp_path):
    given = examples([1] * 50)
    first = first_rows(50, 12, "0/1")
    stored = Examples(50, ((number, given[number]) for number in first), tmp_path)
    assert len(first) == 12 and first == sorted(first) and first != list(range(12))
    assert list(islice(epochs(stored, "0/1"), 12)) == list(islice(epochs(given, "0/1"), 12))
    assert first_rows(50, 50, "0/1") == first_rows(50, 80, "0/2") == range(50)


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
    orders = {tuple(first_rows(50, 12, order_of(seed, round_))) for seed in (0, 1) for round_ in (1, 2)}
    assert len(orders) == 4
