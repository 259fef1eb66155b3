"""Rows as tokens, and the order in which they come.

Examples    rows whose tokens lie in a file, so that memory does not grow with them
batches     what goes through a model at once; groups: their numbers
epochs      passes over a device's rows
in_shares   passes over public texts, each as often as it counts
"""

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, Protocol

import msgspec

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
    def prompt(self) -> int:
        """Tokens before the first learned one, at least one; all tokens if a head learns the row's label."""
        learned = (number for number, label in enumerate(self.labels) if label != IGNORED)
        return max(next(learned, len(self.ids)), 1)

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
    """Examples in a file without a name, which is gone with this object; each is read when asked for.

    They are asked for by place. Not every row of the data needs to have an example here:

        rows of the data            0  1  2  3  4  5        count = 6
        a round draws 1, 2 and 5;   row 2 teaches nothing
        examples[0], examples[1]    rows 1 and 5            place(5) = 1, place(2) = None
    """

    def __init__(self, count: int, numbered: Iterable[tuple[int, Example]], folder: Path) -> None:
        """Write the examples.

        Args:
            count: rows of the data.
            numbered: examples, each after the number of its row from 0; the numbers rise.
            folder: where the file lies.
        """
        # the file is open for as long as this object lives
        self.count, self._numbers, self._ends = count, array("Q"), array("Q", [0])
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115
        for number, example in numbered:
            self._numbers.append(number)
            self._ends.append(self._ends[-1] + self._file.write(msgspec.msgpack.encode(example)))

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._numbers)

    def __getitem__(self, place: int, /) -> Example:
        """The example at a place; raises IndexError where there is none."""
        if not 0 <= place < len(self):
            raise IndexError(f"there is no example {place}, but {len(self)}")
        # read, not mapped: mapped pages would count as resident memory
        self._file.seek(self._ends[place])
        return msgspec.msgpack.decode(
            self._file.read(self._ends[place + 1] - self._ends[place]), type=Example
        )

    def place(self, number: int) -> int | None:
        """The place of a row's example, by the row's number; None: the row has no example here."""
        place = bisect_left(self._numbers, number)
        return place if place < len(self) and self._numbers[place] == number else None


def batches(examples: Indexed, rows: int) -> Iterator[list[Example]]:
    """The examples of each group of `groups`."""
    return ([examples[number] for number in numbers] for numbers in groups(examples, rows))


def groups(examples: Indexed, rows: int) -> Iterator[list[int]]:
    """Numbers of at most `rows` examples of one kind, alike in length so that little is padded."""
    for first in range(0, len(examples), SORTED):
        window = range(first, min(first + SORTED, len(examples)))
        traits = ((examples[number].headed, len(examples[number].ids), number) for number in window)
        for _, alike in groupby(sorted(traits), key=lambda trait: trait[0]):
            numbers = [number for *_, number in alike]
            for begin in range(0, len(numbers), rows):
                yield numbers[begin : begin + rows]


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
    """The examples without end, each pass in a new order; equal seeds give equal orders.

    The first pass has the order of all rows of the data, without those that have no example. So a
    round needs examples of the rows of `first_rows` alone.
    """
    draw, left = random.Random(seed), len(examples)
    count, place_of = (examples.count, examples.place) if isinstance(examples, Examples) else (left, int)
    for number in permuted(count, draw):
        if (place := place_of(number)) is not None:
            yield examples[place]
            left -= 1
        if not left:
            break
    while True:
        yield from (examples[place] for place in permuted(len(examples), draw))


def first_rows(count: int, taken: int, seed: str) -> Sequence[int]:
    """The numbers of the rows that `epochs` takes first of `count`, rising; taken: how many it takes."""
    return range(count) if taken >= count else sorted(islice(permuted(count, random.Random(seed)), taken))


def order_of(seed: int, round_: int) -> str:
    """The seed of the order in which a round takes a device's rows."""
    return f"{seed}/{round_}"
