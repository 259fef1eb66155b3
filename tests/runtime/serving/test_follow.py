"""The follower takes versions in for as long as the process lives, whatever a version does."""

import queue

import numpy as np
import pytest

from edge_runtime.adapters import learned
from edge_runtime.adapters.learned import Learned
from edge_runtime.serving.follow import Follower
from edge_runtime.state import stamp

WAIT_S = 20  # for an event, at most


class MemoryShort:
    """An engine without a model: odd versions do not fit the device's memory."""

    version = 0

    def swap(self, adapter):
        if adapter.version % 2:
            raise RuntimeError("CUDA out of memory")
        self.version = adapter.version


@pytest.fixture
def publish(tiny_facts, tmp_path):
    """publish(number): a version of the tiny model's adapter appears in the folder."""
    out, into = tiny_facts.linears["q"]
    factors = {(n, "q"): (np.zeros((1, into), np.float32), np.zeros((out, 1), np.float32)) for n in range(4)}
    adapter = Learned(tiny_facts, (0, 1, 2, 3), factors, 0, tiny_facts.source)
    return lambda number: learned.write(adapter._replace(version=number), tmp_path / "adapter")


def test_a_version_that_fails_in_the_engine_is_told_and_the_next_is_taken(publish, tiny_facts, tmp_path):
    events = queue.Queue()
    Follower(MemoryShort(), tiny_facts, tmp_path / "adapter", stamp(tmp_path / "adapter"), events.put)
    for number, phase, version in ((1, "refused", 0), (2, "version", 2), (3, "refused", 2)):
        publish(number)
        event = events.get(timeout=WAIT_S)
        assert (event.phase, event.version) == (phase, version)
        assert ("CUDA out of memory" in event.text) == (phase == "refused")


def test_a_listener_that_went_away_does_not_end_the_thread(publish, tiny_facts, tmp_path):
    told = queue.Queue()

    def tell(event):
        told.put(event.version)
        raise BrokenPipeError

    Follower(MemoryShort(), tiny_facts, tmp_path / "adapter", stamp(tmp_path / "adapter"), tell)
    for number in (2, 4):
        publish(number)
        assert told.get(timeout=WAIT_S) == number


def test_a_reader_s_failure_of_any_kind_is_told(publish, tiny_facts, tmp_path, monkeypatch):
    events = queue.Queue()
    Follower(MemoryShort(), tiny_facts, tmp_path / "adapter", stamp(tmp_path / "adapter"), events.put)
    with monkeypatch.context() as patch:
        patch.setattr(learned, "read", lambda folder: [][0])
        publish(2)
        event = events.get(timeout=WAIT_S)
        assert (event.phase, event.text) == (
            "refused",
            "a version failed: IndexError('list index out of range')",
        )
    publish(4)
    assert events.get(timeout=WAIT_S).version == 4
