"""One run of a study: an arm with a seed. Its devices work one after another in this process.

Each round, every device trains from the latest version (trainer/run.py), and the node checks and
merges the deltas (aggregator/merge.py). Both run on real files. The link and the planner are left
out, and base models stay in memory from one job to the next.
"""

import hashlib
import platform
import shutil
import time
from collections import defaultdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import edge_broker
import edge_kernels
import msgspec
from edge_broker import messages
from edge_broker.journal import Update
from transformers import PreTrainedModel

import edge_runtime
from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.agent import local_round
from edge_runtime.agent.local_round import DeviceRows, LocalRounds, Task
from edge_runtime.aggregator import check
from edge_runtime.aggregator.store import Version
from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.protocol.round import CODEC
from edge_runtime.simulation.participants import Participant, member, participants, write_files
from edge_runtime.simulation.results import Answers, Outcome, short
from edge_runtime.simulation.spec import ANCHORS, Arm, Spec
from edge_runtime.simulation.versions import Versions
from edge_runtime.trainer.base import Bases
from edge_runtime.trainer.job import Job, Machine
from edge_runtime.trainer.run import run

ROWS_AT_ONCE = 8  # a micro-batch; its rows are alike in length, so little is padded


def run_arm(
    spec: Spec, arm: Arm, seed: int, *, files: Path, models: Path, folder: Path, bases: Bases
) -> Outcome:
    """Train one arm with one seed.

    Args:
        files: folder of the data files.
        models: folder that relative paths of models start from.
        folder: for files of the devices and the node; emptied before and deleted after.
        bases: where the trainer takes base models from.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    fleet = spec.fleet_of(arm, seed)
    method = methods.of(fleet)
    members = participants(spec, arm, fleet, files, models)
    write_files(spec, fleet, members, files, folder)
    versions = Versions(fleet, method, folder / "versions")
    devices = _Devices(spec, arm, fleet, members, folder, bases)
    for round_ in range(1, fleet.rounds + 1):
        versions.merge(devices.work(round_, versions), round_)
    # after the last round the devices evaluate alone
    devices.work(fleet.rounds + 1, versions)
    shutil.rmtree(folder)
    return Outcome(
        arm=arm.name,
        seed=seed,
        digest=spec.digest(arm, seed),
        seconds=round(time.monotonic() - began, 1),
        machine=processor(),
        code=code(),
        moved=versions.moved,
        cosines=versions.cosines,
        members=[member(participant, fleet, method) for participant in members],
    )


class _Devices:
    """The devices' side of a run."""

    def __init__(
        self,
        spec: Spec,
        arm: Arm,
        fleet: settings.Fleet,
        participants: list[Participant],
        folder: Path,
        bases: Bases,
    ) -> None:
        self.spec, self.arm, self.fleet, self.method = spec, arm, fleet, methods.of(fleet)
        self.participants, self.folder, self.bases = participants, folder, bases
        # Shapes of the tensors that devices have sent, by model class.
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        private = [factor for factor in self.method.factors.values() if factor.shared == "private"]
        # Devices of one model and rank begin a round with equal adapters, so one evaluation serves
        # them all.
        self.all_shared = not any(factor.trained for factor in private)
        self.rounds = {each.device.id: _rounds(folder / each.device.id) for each in participants}

    def work(self, round_: int, versions: Versions) -> list[Update]:
        """Let each device evaluate and train; after the last round it evaluates alone."""
        updates = []
        evaluated: dict[Any, dict[str, Answers]] = {}
        for participant in self.participants:
            device = participant.device
            rounds = self.rounds[device.id]
            task = self.task(participant, round_, versions.latest(participant.facts.model_class))
            job, folder = rounds.job(task), rounds.folder(task)
            # Before the first version, heads have the labels of each device's own rows and differ.
            shared = self.all_shared and job.start is not None
            model = job.plan.model_class, job.plan.depth, job.plan.rank
            alike = (*model, device.data, device.domains) if shared else device.id
            if alike in evaluated:
                job = msgspec.structs.replace(job, evaluation={})
            local_round.write_job(folder, job)
            run(folder, self.bases, lambda _: None)
            result = local_round.read_result(folder)
            assert result is not None  # `run` raises where there is none
            participant.answers.append(evaluated.setdefault(alike, _answers(result)))
            if not job.train:
                continue
            participant.bytes_up.append(result.payload_bytes)
            participant.bytes_down.append(Path(job.start).stat().st_size if job.start else 0)
            rounds.keep(task, result)
            # the node of a study takes every update
            rounds.settle(task.number, "taken")
            participant.rank = rounds.rank_limit(task.number + 1) or participant.rank
            if payload := local_round.payload_of(folder, result):
                updates.append(self.update(payload, device.id, job, result.samples))
        return updates

    def task(self, participant: Participant, round_: int, latest: Version | None) -> Task:
        """A device's work in a round."""
        facts, fleet, rank = participant.facts, self.fleet, participant.rank
        plan = Plan(
            source=participant.device.model,
            model_class=facts.model_class,
            depth=participant.depth,
            layers=facts.layers,
            weights=self.spec.study.weights,
            rows=ROWS_AT_ONCE,
            tokens=fleet.training.max_tokens,
            rank=rank,
            kept_blocks=participant.depth,  # all: memory is not studied here
            terms={},
            step_seconds=0.0,
        )
        training = msgspec.structs.replace(
            fleet.training,
            steps=fleet.training.steps * participant.stands_for,
            slices="own" if self.arm.pooled else fleet.training.slices,
        )
        return Task(
            number=min(round_, fleet.rounds),
            train=round_ <= fleet.rounds,
            fleet=msgspec.structs.replace(fleet, training=training),
            facts=facts,
            plan=plan,
            start=latest.artifact if latest else None,
            anchors=self.folder / ANCHORS if fleet.codistill is not None else None,
        )

    def update(self, payload: Path, device: str, job: Job, samples: int) -> Update:
        """A checked update, as the node's journal has it."""
        model_class = job.facts.model_class
        delta = check.check(payload.read_bytes(), self.shapes[model_class], self.fleet, self.method)
        self.shapes[model_class] |= {key: value.shape for key, value in delta.items()}
        origin = messages.Origin(
            fleet=self.fleet.name,
            device=device,
            round=job.round,
            model_class=model_class,
            codec=CODEC,
            samples=samples,
        )
        return Update(messages.describe(payload, origin, payload.stat().st_size), payload)


class _Notes(dict[str, str]):
    """What a device remembers of its rounds, for as long as the run lasts."""

    def set(self, name: str, value: str | None) -> None:
        """Keep a value; None forgets it."""
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value


def _rounds(folder: Path) -> LocalRounds:
    held_out = {name: folder / f"{name}.jsonl" for name in ("seen", "unseen")}
    evaluation = {name: path for name, path in held_out.items() if path.exists()}
    return LocalRounds(folder, _Notes(), DeviceRows(folder / "train.jsonl", evaluation), Machine(threads=1))


def _answers(result: Result) -> dict[str, Answers]:
    return {
        name: Answers(
            right=round(score.accuracy * score.rows),
            rows=score.rows,
            loss=None if score.loss is None else short(score.loss),
        )
        for name, score in result.evaluation.items()
    }


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


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@cache
def code() -> str:
    """Versions of the libraries that compute, and a digest of this project's source."""
    digest = hashlib.sha256()
    for package in (edge_broker, edge_kernels, edge_runtime):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"Python {platform.python_version()}, {libraries}, source {digest.hexdigest()[:8]}"
