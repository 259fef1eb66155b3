"""One run of a study: an arm with a seed. Its devices work one after another in this process.

Each round, every device trains from the latest version (trainer/run.py), and the node checks and
merges the deltas (aggregator/merge.py). Both run on real files. The link and the planner are left
out, and base models stay in memory from one job to the next.
"""

import hashlib
import platform
import shutil
import time
from functools import cache
from importlib.metadata import version
from importlib.resources import files as files_of
from pathlib import Path
from typing import Any

import edge_profiles
import msgspec
import numpy as np
from transformers import PreTrainedModel

from edge_runtime import methods
from edge_runtime.adapters import attach
from edge_runtime.agent import local_round
from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.simulation import draw
from edge_runtime.simulation.participants import Participant, answers, member, participants
from edge_runtime.simulation.results import Flags, Outcome
from edge_runtime.simulation.spec import PUBLIC, Arm, Spec
from edge_runtime.simulation.versions import Versions
from edge_runtime.trainer import data
from edge_runtime.trainer.base import Bases
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.run import run

HELD_OUT = "held out"  # name of the file in jobs


def run_arm(
    spec: Spec, arm: Arm, seed: int, digest: str, *, files: Path, models: Path, folder: Path
) -> Outcome:
    """Train one arm with one seed.

    Args:
        digest: of the run.
        files: folder of the data files.
        models: folder that relative paths of models start from.
        folder: for files of the devices and the node; emptied before and deleted after.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.process_time()
    fleet = spec.fleet_of(arm, seed)
    method = methods.of(fleet)
    texts = None
    if fleet.public is not None:
        oracle = fleet.codistill is not None and fleet.codistill.votes == "oracle"
        texts = data.write_rows(folder / PUBLIC, draw.public_texts(spec, files, labelled=oracle))
    members = participants(spec, arm, fleet, files, models, folder)
    versions = Versions(fleet, method, folder / "versions")
    # one round more, in which the devices evaluate alone
    for round_ in range(1, fleet.rounds + 2):
        _work(members, round_, versions, texts)
        versions.merge(round_)
    shutil.rmtree(folder)
    return Outcome(
        arm=arm.name,
        seed=seed,
        digest=digest,
        seconds=round(time.process_time() - began, 1),
        machine=edge_profiles.probe().description,
        code=code(),
        moved=versions.moved,
        cosines=versions.cosines,
        members=[member(participant, method) for participant in members],
    )


def _work(members: list[Participant], round_: int, versions: Versions, texts: Path | None) -> None:
    """Let each device evaluate and train; after the last round it evaluates alone, on all held-out rows."""
    rounds = versions.fleet.rounds
    # Devices of a model and a rank begin a round with equal adapters: one evaluation serves them all.
    all_shared = not any(factor.private for factor in versions.method.factors.values())
    evaluated: dict[Any, Flags] = {}
    for participant in members:
        plan, task = participant.plan, participant.device.data
        latest = versions.latest(plan.model_class)
        start = local_round.Start(latest.chain if latest else (), texts)
        number, train = min(round_, rounds), round_ <= rounds
        job = participant.rounds.job(number, participant.fleet, participant.facts, plan, start, train=train)
        # Before the first version, heads have the labels of each device's own rows and differ.
        shared = all_shared and latest is not None
        alike = (plan.model_class, plan.depth, plan.rank, task) if shared else participant.device.id
        if alike not in evaluated:
            held_out = participant.held_out.sample_file if train else participant.held_out.file
            job = msgspec.structs.replace(job, evaluation={HELD_OUT: str(held_out)})
        if job.evaluation or train:
            result = _done(job, participant.rounds.folder(job))
            for score in result.evaluation.values():
                bits = np.unpackbits(np.frombuffer(score.hits, np.uint8), count=score.rows)
                evaluated[alike] = bits.astype(bool)
            if train:
                _hand_in(participant, job, result, versions)
        if train:
            seen = participant.seen[participant.held_out.sample]
            participant.answers.append(answers(evaluated[alike], seen))
        else:
            participant.hits = evaluated[alike]


def _done(job: Job, folder: Path) -> Result:
    """Do a job in a folder."""
    local_round.write_job(folder, job)
    run(folder, BASES, lambda _: None)
    result = local_round.read_result(folder)
    assert result is not None  # `run` raises where there is none
    return result


def _hand_in(participant: Participant, job: Job, result: Result, versions: Versions) -> None:
    """Give the device's update to the node, which takes each; note its bytes and next rank."""
    participant.bytes_up.append(result.payload_bytes)
    fetched = [path for path in job.start if path not in participant.start]
    participant.bytes_down.append(sum(Path(path).stat().st_size for path in fetched))
    participant.start = job.start
    rounds = participant.rounds
    rounds.keep(job, result)
    rounds.settle(job.round, "taken")
    rank = rounds.rank_limit(job.round + 1) or job.plan.rank
    participant.plan = msgspec.structs.replace(job.plan, rank=rank)
    if payload := local_round.payload_of(rounds.folder(job), result):
        versions.take(payload, participant.device.id, job, result.samples)


@cache
def code() -> str:
    """Versions of the libraries that compute, and a digest of this project's source."""
    digest = hashlib.sha256()
    for package in ("edge_broker", "edge_kernels", "edge_runtime"):
        for path in sorted(Path(str(files_of(package))).rglob("*.py")):
            digest.update(path.read_bytes())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"Python {platform.python_version()}, {libraries}, source {digest.hexdigest()[:8]}"


class CachedBases(Bases):
    """Base models and tokenizers that stay in memory once they were read."""

    def __init__(self) -> None:
        self._models: dict[Any, PreTrainedModel] = {}
        self._tokenizers: dict[str, Any] = {}

    def tokenizer(self, facts: Facts) -> Any:
        """The tokenizer of a checkpoint."""
        if facts.folder not in self._tokenizers:
            self._tokenizers[facts.folder] = super().tokenizer(facts)
        return self._tokenizers[facts.folder]

    def model(self, facts: Facts, plan: Plan, device: str) -> PreTrainedModel:
        """The base model of a plan, without an adapter."""
        key = facts.model_class, plan.depth, plan.weights, device
        if key not in self._models:
            self._models[key] = super().model(facts, plan, device)
        attach.detach(self._models[key])  # a job that failed leaves its adapter attached
        return self._models[key]


BASES = CachedBases()  # of this process, for all its runs
