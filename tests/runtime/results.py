"""What tests report of rounds and runs that nobody has trained."""

import numpy as np

from edge_runtime.protocol.report import Result, Score
from edge_runtime.simulation import spec
from edge_runtime.simulation.results import Answers, Flags, Member, Outcome, packed


def result(evaluation: dict[str, Score]) -> Result:
    """The result of a round, with these scores and nothing else."""
    return Result(
        samples=1,
        evaluation=evaluation,
        losses=[],
        step_seconds=[],
        phases={},
        seconds={},
        measured_peak_bytes=0,
        payload_bytes=0,
    )


def outcome(name: str, seed: int, right: int) -> Outcome:
    """Of ten rows with seen labels `right` are right, and of thirty others half the share."""
    hits = np.concatenate([np.arange(10) < right, np.arange(30) < right * 3 // 2])
    return flagged(name, seed, np.arange(40) < 10, hits)


def flagged(name: str, seed: int, seen: Flags, *hits: Flags) -> Outcome:
    """A run whose devices, one for each array of hits, hold the labels of the rows that are `seen`."""
    answers = [{"seen": Answers(3, 10), "unseen": Answers(3, 30)}]
    sizes = {"held_out": len(seen), "seen": packed(seen), "bytes_up": [1000], "bytes_down": [500]}
    members = [
        Member(f"{number}", "m@1", 2, "colours", 5, 3, 1000, answers, hits=packed(each), **sizes)
        for number, each in enumerate(hits)
    ]
    return Outcome(name, seed, f"{spec.COMPUTATION}-", 1.0, "", "", [], [], members)
