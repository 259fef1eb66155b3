"""The queue before an engine: one thread, which gives each running answer a token in turn.

    submitted ─> waiting (bounded) ─> running (at most `parallel`) ─> finished, or cancelled

Answers are not computed as a batch: two that run take twice the time of one, and neither waits for
the other's end.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator

from edge_runtime.errors import EdgeError
from edge_runtime.serving.answer import Piece, Question, answer
from edge_runtime.serving.engine import Engine
from edge_runtime.serving.text import Language
from edge_runtime.trainer.heap import release

Post = Callable[[Piece | Exception], object]


class BusyError(EdgeError):
    """As many requests wait as may."""


class Submitted:
    """A submitted request."""

    def __init__(self, question: Question, post: Post) -> None:
        self.question, self.post, self.cancelled = question, post, False


class Worker:
    """An engine's thread."""

    def __init__(self, engine: Engine, language: Language, parallel: int, waiting: int) -> None:
        """Start the thread.

        Args:
            engine: used by this thread alone, but for `swap`.
            language: of the engine's model.
            parallel: answers that run at once; each has keys and values of its own.
            waiting: further requests that may wait.
        """
        self._engine, self._language, self._parallel, self._limit = engine, language, parallel, waiting
        self._changed, self._ending = threading.Condition(), False
        self._waiting: deque[Submitted] = deque()
        self._running: list[tuple[Submitted, Iterator[Piece]]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, question: Question, post: Post) -> Submitted:
        """Put a request into the queue.

        Args:
            question: prompt and answer fit the context.
            post: called in the worker's thread with each piece; the last has a finish. An exception
                in place of a piece is the last, too.

        Raises:
            BusyError: the queue is full.
        """
        submitted = Submitted(question, post)
        with self._changed:
            if len(self._waiting) + len(self._running) >= self._limit + self._parallel:
                raise BusyError(
                    f"{len(self._running)} answers are being written and {len(self._waiting)} requests wait, which is "
                    "the most that may: try again later"
                )
            self._waiting.append(submitted)
            self._changed.notify()
        return submitted

    def cancel(self, submitted: Submitted) -> None:
        """Forget a request: its memory is free before the next token of any answer."""
        with self._changed:
            submitted.cancelled = True
            if submitted in self._waiting:
                self._waiting.remove(submitted)

    def close(self) -> None:
        """End the thread after the token that it computes; answers that run stay without an end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._admit():
            # no name outlives the turn: an answer's keys and values go with its entry in the list
            self._running = [each for each in self._running if self._step(*each)]
            if not self._running:
                release()

    def _admit(self) -> bool:
        """Wait for work, and let waiting requests run where there is room; False: the worker ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._ending)
            while self._waiting and len(self._running) < self._parallel:
                submitted = self._waiting.popleft()
                self._running.append((submitted, answer(self._engine, self._language, submitted.question)))
            return not self._ending

    def _step(self, submitted: Submitted, pieces: Iterator[Piece]) -> bool:
        """Compute and post the next piece; False: it was the last, or nobody waits for it."""
        if submitted.cancelled:
            return False
        try:
            piece = next(pieces)
        # the client is told of any failure, and the other answers go on
        except Exception as error:
            submitted.post(error)
            return False
        submitted.post(piece)
        return piece.finish is None
