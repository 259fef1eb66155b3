"""Rows as tokens, and the order in which they come.

Examples    rows whose tokens lie in a file, so that memory does not grow with them
batches     what goes through a model at once
epochs      passes over a device's rows
in_shares   passes over public texts, each as often as it counts
"""

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, Protocol

import msgspec

from edge_runtime.errors import InputError
from edge_runtime.trainer.data import permuted

IGNORED = -100  # label of a token that is not learned, as torch's cross-entropy has it
SORTED = 1 << 12  # examples that are sorted by length at once


class Example(NamedTuple):
    """A row as tokens; at least one of them is learned, unless a head learns the row's label."""

    ids: list[int]
    labels: list[int]  # each token if it is learned, else IGNORED; empty if a head learns the row
    answer: int | None = None  # number of the label, IGNORED if the head lacks it; None: text

    @property
    def headed(self) -> bool:
        """Whether a head learns the row's label."""
        return self.answer is not None

    @property
    def counted(self) -> int:
        """Learned labels. The first token is never among them: no token before it predicts it."""
        if self.headed:
            return int(self.answer != IGNORED)
        return sum(label != IGNORED for label in self.labels[1:])


class Indexed(Protocol):
    """Examples by number: a list, or `Examples`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Example: ...


class Examples:
    """Examples in a file without a name, which is gone with this object; each is read when asked for."""

    def __init__(self, count: int, numbers: Sequence[int], examples: Iterable[Example], folder: Path) -> None:
        """Write the examples.

        Args:
            count: rows that are there, of which some are never asked for.
            numbers: those of `examples`, rising.
            folder: where the file lies.

        Raises:
            InputError: there are fewer examples than numbers.
        """
        # the file is open for as long as this object lives
        self._count, self._numbers, self._ends = count, numbers, array("Q", [0])
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115
        for example in examples:
            self._ends.append(self._ends[-1] + self._file.write(msgspec.msgpack.encode(example)))
        if len(self._ends) <= len(numbers):
            raise InputError("a file of rows has become shorter while it was read: wait until it is complete")

    def __len__(self) -> int:
        """How many rows there are."""
        return self._count

    def __getitem__(self, number: int, /) -> Example:
        """The example of a row, by its number; raises IndexError where that row was not written."""
        place = bisect_left(self._numbers, number)
        if place == len(self._numbers) or self._numbers[place] != number:
            raise IndexError(f"the example of row {number} was not written")
        # read, not mapped: mapped pages would count as resident memory
        self._file.seek(self._ends[place])
        return msgspec.msgpack.decode(
            self._file.read(self._ends[place + 1] - self._ends[place]), type=Example
        )


def batches(examples: Indexed, rows: int) -> Iterator[list[Example]]:
    """Groups of at most `rows` examples of one kind, alike in length so that little is padded."""
    for first in range(0, len(examples), SORTED):
        window = range(first, min(first + SORTED, len(examples)))
        traits = ((examples[number].headed, len(examples[number].ids), number) for number in window)
        for _, alike in groupby(sorted(traits), key=lambda trait: trait[0]):
            numbers = [number for *_, number in alike]
            for begin in range(0, len(numbers), rows):
                yield [examples[number] for number in numbers[begin : begin + rows]]


def in_shares(examples: list[Example], shares: Sequence[float], seed: str) -> Iterator[Example]:
    """The examples without end, each as often as its share says; at least one share is above 0.

    Each pass has a new order. An example of the largest share comes in every pass, and an example
    of half that share in every second.
    """
    draw = random.Random(seed)
    credits, largest = [draw.random() for _ in examples], max(shares)
    while True:
        for number in draw.sample(range(len(examples)), len(examples)):
            credits[number] += shares[number] / largest
            if credits[number] >= 1:
                credits[number] -= 1
                yield examples[number]


def epochs(examples: Indexed, seed: str) -> Iterator[Example]:
    """The examples without end, in the order of `drawn`."""
    return (examples[number] for number in drawn(len(examples), seed))


def order_of(seed: int, round_: int) -> str:
    """The seed of the order in which a round takes a device's rows."""
    return f"{seed}/{round_}"


def drawn(count: int, seed: str) -> Iterator[int]:
    """The numbers below `count` without end, each pass in a new order; equal seeds give equal orders."""
    draw = random.Random(seed)
    while True:
        yield from permuted(count, draw)
