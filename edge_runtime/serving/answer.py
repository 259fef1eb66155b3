"""One answer: a prompt is fed a piece at a time, then one token after another is chosen and fed.

`answer` yields after every pass through the model, so a caller can let several answers take turns.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import EdgeError
from edge_runtime.planning.serving import PIECE
from edge_runtime.serving.engine import Engine
from edge_runtime.serving.text import Language, TextStream

Finish = Literal["stop", "length"]


class Question(NamedTuple):
    """A prompt, and how its answer is chosen."""

    ids: list[int]  # of the prompt, at least one
    most_tokens: int  # of the answer, at least one
    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0  # tokens are drawn from the likeliest, which together have this probability
    seed: int | None = None  # None: another draw each time
    stop: tuple[str, ...] = ()  # texts before which the answer ends
    spaces: str = ""  # at the prompt's end, which the answer begins with (trainer/tokens.py)


class Piece(NamedTuple):
    """What a pass through the model adds to an answer."""

    text: str  # may be empty: a part of the prompt, half a character
    tokens: int  # of the answer so far, its end included
    version: int  # of the adapter
    finish: Finish | None = None  # of the last piece: why the answer ends


def answer(engine: Engine, language: Language, question: Question) -> Iterator[Piece]:
    """Yield the pieces of an answer.

    Raises:
        EdgeError: the model's logits are not finite.
    """
    sequence, choose = engine.begin(), chooser(question)
    stream = TextStream(language, question.ids, question.stop, question.spaces)
    for first in range(0, len(question.ids), PIECE):
        if first:
            yield Piece("", 0, sequence.version)
        logits = sequence.feed(question.ids[first : first + PIECE])
    for count in range(1, question.most_tokens + 1):
        if not np.isfinite(logits.max()):
            raise EdgeError(
                f"the model's logits are not finite with version {sequence.version} of the adapter"
            )
        token = choose(logits)
        if token in language.ends:
            yield Piece(stream.rest(), count, sequence.version, "stop")
            return
        text = stream.push(token)
        if stream.stopped:
            yield Piece(text, count, sequence.version, "stop")
            return
        if count < question.most_tokens:
            yield Piece(text, count, sequence.version)
            logits = sequence.feed([token])
    yield Piece(text + stream.rest(), question.most_tokens, sequence.version, "length")


def chooser(question: Question) -> Callable[[NDArray[np.float32]], int]:
    """A function from logits (vocabulary,) to the next token."""
    if question.temperature == 0:
        return lambda logits: int(logits.argmax())
    draw = np.random.default_rng(question.seed)

    def choose(logits: NDArray[np.float32]) -> int:
        scaled = (logits.astype(np.float64) - logits.max()) / question.temperature
        weights = np.exp(scaled)
        if question.top_p < 1:
            weights = _nucleus(weights / weights.sum(), question.top_p)
        sums = weights.cumsum()
        return int(np.searchsorted(sums, draw.random() * sums[-1], side="right"))

    return choose


def _nucleus(p: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """The probabilities with all but the likeliest tokens at 0, as few as have top_p in all.

    Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    # tokens below this are outside: all of them together have less than the other 1 - top_p
    places = np.flatnonzero(p >= (1 - top_p) / len(p))
    places = places[p[places].argsort()[::-1]]
    count = int(np.searchsorted(p[places].cumsum(), top_p)) + 1
    inside = np.zeros_like(p)
    inside[places[:count]] = p[places[:count]]
    return inside
