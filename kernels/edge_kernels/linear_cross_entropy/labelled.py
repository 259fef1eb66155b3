"""The tokens of a batch that have a label, apart from the others."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

IGNORED = -100  # label of a token that does not count


class Labelled(NamedTuple):
    """Where the labelled tokens are among the rows of a batch, and their labels."""

    places: torch.Tensor | None  # (tokens,) int64, their rows in order; None: every row has a label
    targets: torch.Tensor  # (tokens,) int64

    @property
    def tokens(self) -> int:
        """The number of labelled tokens."""
        return len(self.targets)

    def chunks(self, rows: torch.Tensor, step: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The labelled rows (step, n) at a time, each with its place among the labelled tokens."""
        step = max(step, 1)
        for first in range(0, self.tokens, step):
            chunk = slice(first, min(first + step, self.tokens))
            yield chunk, rows[chunk] if self.places is None else rows[self.places[chunk]]


def labelled_tokens(labels: torch.Tensor, vocabulary: int) -> Labelled:
    """Find the tokens whose label is not IGNORED.

    Raises:
        ValueError: a label is neither IGNORED nor in 0..vocabulary-1.
    """
    flat = labels.reshape(-1)
    counted = flat != IGNORED
    wrong = counted & ((flat < 0) | (flat >= vocabulary))
    tokens, faults = torch.stack((counted.sum(), wrong.sum())).tolist()  # the only wait for a GPU
    if faults:
        lowest, highest = torch.stack(flat[counted].aminmax()).tolist()
        raise ValueError(f"labels go from {lowest} to {highest}, the head has {vocabulary} rows")
    if tokens == len(flat):
        return Labelled(None, flat)
    places = torch.argsort(~counted, stable=True)[:tokens]
    return Labelled(places, flat[places])


def spread(
    dh: torch.Tensor, share: torch.Tensor, places: torch.Tensor | None, shape: torch.Size
) -> torch.Tensor:
    """share · dh at the places of the labelled tokens, zero elsewhere.

    The product is made in float32: a share of 1 / tokens is not a normal number in float16.

    Args:
        dh: (tokens, n), the gradient of the labelled rows.
        share: () float32.
        places: as in Labelled.
        shape: of all rows.
    """
    scaled = torch.mul(dh, share.view(1), out=torch.empty_like(dh))
    return scaled if places is None else dh.new_zeros(shape).index_copy_(0, places, scaled)
