"""Depth slices are nested and keep the layers at either end."""

from itertools import pairwise

import pytest

from edge_runtime.models.slices import kept_layers, nested_blocks


@pytest.mark.parametrize(
    ("depth", "layers", "kept"),
    [
        (1, 1, (0,)),
        (1, 30, (0,)),
        (2, 30, (0, 29)),
        (3, 30, (0, 1, 29)),
        (5, 6, (0, 1, 2, 4, 5)),
        (6, 6, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_a_slice_keeps_the_first_half_and_the_last(depth, layers, kept):
    assert kept_layers(depth, layers) == kept


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_slices_are_nested_and_in_order(layers):
    slices = [kept_layers(depth, layers) for depth in range(1, layers + 1)]
    assert [len(kept) for kept in slices] == list(range(1, layers + 1))
    assert all(list(kept) == sorted(set(kept)) for kept in slices)
    assert all(set(less) < set(more) for less, more in pairwise(slices))


def test_smaller_slices_are_found_inside_a_slice():
    assert nested_blocks((5, 4, 1), depth=5, layers=9) == [(0, 1, 2, 3, 4), (0, 1, 3, 4), (0,)]
    with pytest.raises(ValueError, match="not in tuple"):
        nested_blocks((6,), depth=5, layers=9)


@pytest.mark.parametrize("depth", [0, -1, 31])
def test_a_slice_that_cannot_be_cut_is_refused(depth):
    with pytest.raises(
        ValueError, match=f"a slice of {depth} layers cannot be cut from a model of 30: choose 1 to 30"
    ):
        kept_layers(depth, 30)
