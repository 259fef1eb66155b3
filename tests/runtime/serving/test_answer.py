"""How an answer is chosen, where it ends, and what a worker does with many."""

import queue
import threading

import numpy as np
import pytest

from edge_runtime.errors import EdgeError
from edge_runtime.planning.serving import PIECE
from edge_runtime.serving.answer import Question, answer, chooser
from edge_runtime.serving.text import Language
from edge_runtime.serving.worker import BusyError, Worker

LOGITS = np.log(np.array([0.1, 0.5, 0.3, 0.1], np.float32))


def shares(**how):
    choose = chooser(Question([1], 1, seed=3, **how))
    drawn = [choose(LOGITS) for _ in range(4000)]
    return np.bincount(drawn, minlength=4) / len(drawn)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    assert shares(temperature=1.0) == pytest.approx([0.1, 0.5, 0.3, 0.1], abs=0.03)
    assert shares(temperature=0.5) == pytest.approx(np.array([1, 25, 9, 1]) / 36, abs=0.03)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.4) == pytest.approx([0, 1, 0, 0])
    assert shares() == pytest.approx([0, 1, 0, 0])


def test_a_seed_makes_a_draw_repeatable():
    logits = np.zeros(1000, np.float32)

    def drawn(seed):
        choose = chooser(Question([1], 1, temperature=1.0, seed=seed))
        return [choose(logits) for _ in range(8)]

    assert drawn(5) == drawn(5) != drawn(6)
    assert drawn(None) != drawn(None)


class Counting:
    """An engine that counts on from the last token, one at each pass; a gate can hold it."""

    def __init__(self, vocabulary=1000, broken=()):
        self.version, self.fed, self.gate, self._broken = 1, [], threading.Event(), set(broken)
        self._vocabulary = vocabulary
        self.gate.set()

    def swap(self, learned):
        self.version = learned

    def begin(self):
        engine = self

        class Sequence:
            version = engine.version

            def feed(self, ids):
                assert engine.gate.wait(60)
                engine.fed.append(list(ids))
                if ids[-1] in engine._broken:
                    return np.full(engine._vocabulary, np.nan, np.float32)
                return np.eye(engine._vocabulary, dtype=np.float32)[ids[-1] + 1]

        return Sequence()


@pytest.fixture(scope="module")
def language(demo_facts):
    return Language(demo_facts)


def test_an_answer_ends_at_an_end_token_or_at_its_length(language):
    (end,) = language.ends
    engine = Counting()
    pieces = list(answer(engine, language, Question([end + 10], 5)))
    assert [piece.tokens for piece in pieces] == [1, 2, 3, 4, 5]
    assert [piece.finish for piece in pieces] == [None] * 4 + ["length"]
    (last,) = answer(engine, language, Question([end - 1], 5))
    assert (last.text, last.tokens, last.finish, last.version) == ("", 1, "stop", 1)


def test_a_long_prompt_is_fed_in_pieces(language):
    engine = Counting()
    prompt = [5] * (2 * PIECE + 3)
    pieces = list(answer(engine, language, Question(prompt, 2)))
    assert [len(ids) for ids in engine.fed] == [PIECE, PIECE, 3, 1]
    assert [piece.tokens for piece in pieces] == [0, 0, 1, 2]


def test_logits_that_are_not_finite_are_no_answer(language):
    with pytest.raises(EdgeError, match="not finite with version 1"):
        list(answer(Counting(broken=[50]), language, Question([50], 5)))


@pytest.fixture
def working(language):
    """working(engine, parallel, waiting): a worker that is closed at the end."""
    workers = []

    def start(engine, parallel=2, waiting=1):
        workers.append((engine, Worker(engine, language, parallel, waiting)))
        return workers[-1][1]

    yield start
    for engine, worker in workers:
        engine.gate.set()
        worker.close()


def pieces_of(items):
    """The pieces of an answer up to its end."""
    pieces = [items.get(timeout=60)]
    while pieces[-1].finish is None:
        pieces.append(items.get(timeout=60))
    return pieces


def test_answers_take_turns(working):
    engine = Counting()
    engine.gate.clear()
    worker, posted = working(engine), queue.Queue()
    for start in (100, 200):
        worker.submit(Question([start], 3), posted.put)
    engine.gate.set()
    pieces_of(posted), pieces_of(posted)
    assert [ids[0] for ids in engine.fed] == [100, 200, 101, 201, 102, 202]


def test_more_requests_than_may_wait_are_refused(working):
    engine = Counting()
    engine.gate.clear()
    worker, posted = working(engine, parallel=1, waiting=1), [queue.Queue() for _ in range(2)]
    for items in posted:
        worker.submit(Question([100], 2), items.put)
    with pytest.raises(BusyError, match="the most that may: try again later"):
        worker.submit(Question([100], 2), print)
    engine.gate.set()
    assert [len(pieces_of(items)) for items in posted] == [2, 2]
    worker.submit(Question([100], 2), posted[0].put)
    pieces_of(posted[0])


def test_a_cancelled_request_makes_room(working):
    engine = Counting()
    engine.gate.clear()
    worker, posted = working(engine, parallel=1, waiting=1), queue.Queue()
    running = worker.submit(Question([100], 10**9), print)
    waiting = worker.submit(Question([200], 2), print)
    worker.cancel(waiting)
    worker.submit(Question([300], 2), posted.put)
    worker.cancel(running)
    engine.gate.set()
    pieces_of(posted)
    assert [ids for ids in engine.fed if ids[0] >= 200] == [[300], [301]]


def test_an_answer_that_fails_does_not_end_the_others(working):
    worker = working(Counting(broken=[102]))
    failing, fine = queue.Queue(), queue.Queue()
    worker.submit(Question([100], 5), failing.put)
    worker.submit(Question([200], 5), fine.put)
    assert len(pieces_of(fine)) == 5
    items = [failing.get(timeout=60) for _ in range(3)]
    assert isinstance(items[-1], EdgeError) and [piece.tokens for piece in items[:2]] == [1, 2]
