"""One run of a study: an arm with a seed, its devices one after another in this process.

Devices and node run their own code (trainer/run.py, protocol/codec.py, aggregator/merge.py) on real
files. The link and the planner are left out; base models stay in memory from one job to the next.
"""

import hashlib
import math
import platform
import shutil
import time
from collections import defaultdict
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import edge_broker
import edge_kernels
import msgspec
from edge_broker import messages
from edge_broker.journal import Update
from safetensors.numpy import load_file
from transformers import PreTrainedModel

import edge_runtime
from edge_runtime import methods
from edge_runtime.adapters import attach
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.agent import work
from edge_runtime.aggregator import merge
from edge_runtime.aggregator.store import Version
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning import processes
from edge_runtime.protocol.keys import kind_of
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result, Score
from edge_runtime.protocol.round import CODEC, FLEET
from edge_runtime.simulation.agreement import cosines
from edge_runtime.simulation.cut import cut
from edge_runtime.simulation.spec import ANCHORS, Arm, Device, Spec, anchors, shares, test_rows
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Carried, Job, Machine
from edge_runtime.trainer.run import Bases, run

ROWS_AT_ONCE = 8  # alike in length: little is padded


class Member(msgspec.Struct, frozen=True):
    """A device in a run. depth: its layers. scores: by name, before each round and after the last. seen: rows of labels that it
    holds rows of; unseen: the others. bytes: sent and fetched in each round. steps: of one round."""

    id: str
    model_class: str
    rows: int
    steps: int
    trained_values: int
    scores: list[dict[str, Score]]
    bytes_up: list[int]
    bytes_down: list[int]
    depth: int
    data: str


class Outcome(msgspec.Struct, frozen=True):
    """What a run found.

    digest: of what it depends on in the study's file. code: that it ran with.
    moved: the squared norm of what each round changed of adapters and heads in all versions; empty for methods whose versions
    have the same product in other factors.
    cosines: of each round between the classes' steps (agreement.py), their mean and the share of them below 0; empty where
    nothing trained crosses classes.
    """

    arm: str
    seed: int
    digest: str
    seconds: float
    members: list[Member]
    machine: str = ""
    code: str = ""
    moved: list[float] = []
    cosines: list[tuple[float, float]] = []

    @property
    def accuracy(self) -> float:
        """Mean over the devices after the last round."""
        return sum(accuracy(member, -1) for member in self.members) / len(self.members)


def accuracy(member: Member, round_: int, name: str | None = None) -> float:
    """A device's share of held-out rows that it gets right; of all of them, or of one kind."""
    scores = [score for kind, score in member.scores[round_].items() if name in (None, kind)]
    rows = sum(score.rows for score in scores)
    return sum(score.accuracy * score.rows for score in scores) / rows if rows else float("nan")


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


@cache
def code() -> str:
    """Versions of what computes, and a digest of our own source."""
    found = hashlib.sha256()
    for package in (edge_broker, edge_kernels, edge_runtime):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            found.update(path.read_bytes())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"Python {platform.python_version()}, {libraries}, source {found.hexdigest()[:8]}"


class KeptBases(Bases):
    """Keeps what it has read."""

    def __init__(self) -> None:
        self._models: dict[Any, PreTrainedModel] = {}
        self._tokenizers: dict[str, Any] = {}

    def tokenizer(self, facts: Facts) -> Any:
        if facts.folder not in self._tokenizers:
            self._tokenizers[facts.folder] = super().tokenizer(facts)
        return self._tokenizers[facts.folder]

    def model(self, facts: Facts, plan: Plan, device: str) -> PreTrainedModel:
        key = facts.model_class, plan.depth, plan.weights, device
        if key not in self._models:
            self._models[key] = super().model(facts, plan, device)
        attach.detach(self._models[key])  # where a job failed
        return self._models[key]


class _Run:
    """The state of a fleet in one folder."""

    def __init__(
        self, spec: Spec, arm: Arm, seed: int, files: Path, models: Path, folder: Path, bases: Bases
    ) -> None:
        self.spec, self.arm, self.files, self.models, self.folder = spec, arm, files, models, folder
        self.fleet, self.bases = spec.fleet_of(arm, seed), bases
        self.method = methods.of(self.fleet)
        self.versions: dict[str, Version] = {}
        self.known: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        self.left: dict[str, dict[str, str]] = defaultdict(dict)  # files of the last round, by device
        self.pruned: dict[str, int] = {}  # the rank in which a device goes on
        self.moved: list[float] = []  # by each round: the squared norm of what changed in the versions
        self.cosines: list[tuple[float, float]] = []  # by each round: between the classes

    @cached_property
    def facts(self) -> dict[str, Facts]:
        """Of each device's checkpoint, by its id."""
        sources = {
            device.id: device.source
            if device.first is None
            else cut(device.source, device.first, self.models)
            for device in self.spec.device
        }
        found = {source: processes.prepared(source, self.models) for source in set(sources.values())}
        return {device: found[source] for device, source in sources.items()}

    @cached_property
    def rows(self) -> dict[str, list[data.Row]]:
        return shares(self.spec, self.files, self.fleet.seed)

    @cached_property
    def devices(self) -> list[tuple[Device, list[data.Row], int]]:
        """Each with its rows, and how many of the spec's devices it stands for."""
        if not self.arm.pooled:
            return [(device, self.rows[device.id], 1) for device in self.spec.device]
        found = []
        for device in {(one.model, one.depth, one.data): one for one in reversed(self.spec.device)}.values():
            those = [one for one in self.spec.device if one.data == device.data]
            found.append((device, [row for one in those for row in self.rows[one.id]], len(those)))
        return found

    def job(self, device: Device, standing_for: int, round_: int) -> Job:
        """What the device does in a round; after the last one it evaluates alone."""
        facts, fleet = self.facts[device.id], self.fleet
        rank, depth = self.rank(device), device.depth or facts.layers
        plan = Plan(
            source=device.model,
            model_class=facts.model_class,
            depth=depth,
            layers=facts.layers,
            weights=self.spec.study.weights,
            rows=ROWS_AT_ONCE,
            tokens=fleet.training.max_tokens,
            rank=rank,
            kept_blocks=depth,  # memory is not what is studied
            terms={},
            step_seconds=0.0,
        )
        latest = self.versions.get(facts.model_class, self.versions.get(FLEET))
        steps = fleet.training.steps * standing_for
        held = self.files_of(device)
        return Job(
            train=round_ <= fleet.rounds,
            round=min(round_, fleet.rounds),
            fleet=msgspec.structs.replace(
                fleet, training=msgspec.structs.replace(fleet.training, steps=steps)
            ),
            facts=facts,
            plan=plan,
            data=str(held["train"]),
            evaluation={name: str(path) for name, path in held.items() if name in ("seen", "unseen")},
            depths=(depth,) if self.arm.pooled else work.depths(fleet, plan),
            start=str(latest.artifact) if latest else None,
            anchors=str(self.folder / ANCHORS) if fleet.codistill is not None else None,
            carried=Carried(**self.left[device.id]),
            machine=Machine(threads=1),
        )

    @property
    def all_shared(self) -> bool:
        """Whether devices of one model and rank begin a round with one adapter."""
        factors = self.method.factors.values()
        return not any(factor.trained and factor.shared == "private" for factor in factors)

    def rank(self, device: Device) -> int:
        """Its own, but where the arm has one for all or the method has lowered it."""
        one = self.arm.pooled or "rank" in self.arm.adapter
        own = self.fleet.adapter.rank if one or device.rank is None else device.rank
        return min(own, self.pruned.get(device.id, own))

    def files_of(self, device: Device) -> dict[str, Path]:
        """The device's files by name."""
        folder = self.folder / device.id
        return {path.stem: path for path in folder.glob("*.jsonl")}

    def write_files(self) -> None:
        """Rows of each device, what it is scored on, and the public texts."""
        for device, rows, _ in self.devices:
            folder = self.folder / device.id
            folder.mkdir(parents=True)
            data.write_rows(folder / "train.jsonl", rows)
            held_out = test_rows(self.spec.data[device.data], self.files)
            met = data.labels_of(self.rows[device.id])
            for name, kind in (("seen", True), ("unseen", False)):
                some = [row for row in held_out if (row["label"] in met) is kind]
                if some:
                    data.write_rows(folder / f"{name}.jsonl", some)
        if self.fleet.codistill is not None:
            data.write_rows(self.folder / ANCHORS, anchors(self.spec, self.files))

    def go(self) -> list[Member]:
        """All rounds."""
        self.write_files()
        scores: dict[str, list[dict[str, Score]]] = defaultdict(list)
        up: dict[str, list[int]] = defaultdict(list)
        down: dict[str, list[int]] = defaultdict(list)
        for round_ in range(1, self.fleet.rounds + 2):
            updates = []
            same: dict[
                Any, dict[str, Score]
            ] = {}  # as good as each other: their scores, which one of them found
            for device, _, standing_for in self.devices:
                folder = self.folder / device.id / f"round-{round_}"
                folder.mkdir()
                job = self.job(device, standing_for, round_)
                # before the first version a head has the labels of the device's own rows alone
                shared = self.all_shared and job.start is not None
                same_model = job.plan.model_class, job.plan.depth, job.plan.rank
                alike = (*same_model, device.data, device.domains) if shared else device.id
                if alike in same:
                    job = msgspec.structs.replace(job, evaluation={})
                (folder / "job.json").write_bytes(msgspec.json.encode(job))
                run(folder, self.bases, lambda _: None)
                result = msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)
                scores[device.id].append(same.setdefault(alike, result.evaluation))
                if not job.train:
                    continue
                up[device.id].append(result.payload_bytes)
                down[device.id].append(Path(job.start).stat().st_size if job.start else 0)
                self.keep(device.id, folder)
                if result.rank is not None:
                    self.pruned[device.id] = result.rank
                if result.payload_bytes:
                    updates.append(self.update(folder / "payload.bin", device.id, job, result.samples))
            if updates:
                between = cosines(updates, self.method)
                if between:
                    self.cosines.append(
                        (sum(between) / len(between), sum(one < 0 for one in between) / len(between))
                    )
                made = merge.merge(
                    updates, self.versions, self.fleet, self.method, round_, self.folder / "versions"
                )
                if not self.method.refactored:  # the same product in other factors would count as a move
                    self.moved.append(sum(map(self.moved_by, made)))
                self.versions |= {one.model_class: one for one in made}
        return [
            Member(
                id=device.id,
                model_class=self.facts[device.id].model_class,
                rows=len(rows),
                steps=self.fleet.training.steps * standing_for,
                trained_values=self.trained_values(device),
                scores=scores[device.id],
                bytes_up=up[device.id],
                bytes_down=down[device.id],
                depth=device.depth or self.facts[device.id].layers,
                data=device.data,
            )
            for device, rows, standing_for in self.devices
        ]

    def keep(self, device: str, folder: Path) -> None:
        """What the next round goes on from; the node takes every update."""
        for name, file in (("private", "state.bin"), ("residual", "residual.bin")):
            if (folder / file).exists():
                self.left[device][name] = str(folder / file)

    def update(self, payload: Path, device: str, job: Job, samples: int) -> Update:
        """A checked update as the node's journal has it."""
        model_class = job.facts.model_class
        delta = merge.check(payload.read_bytes(), self.known[model_class], self.fleet, self.method)
        self.known[model_class] |= {key: value.shape for key, value in delta.items()}
        manifest = messages.describe(
            payload,
            fleet=self.fleet.name,
            device=device,
            round=job.round,
            model_class=model_class,
            codec=CODEC,
            samples=samples,
            chunk_bytes=payload.stat().st_size,
        )
        return Update(manifest, payload)

    def moved_by(self, version: Version) -> float:
        """The squared norm of what a round changed of a class's adapter."""
        total, before = 0.0, self.versions.get(version.model_class)
        old = load_file(before.master) if before is not None else {}
        for key, value in load_file(version.master).items():
            if kind_of(key) in merge.STATE:
                start = old.get(key)
                start = merge.version_0(key, value.shape, self.fleet, self.method) if start is None else start
                total += float(((value - start) ** 2).sum(dtype="float64"))
        return total

    def trained_values(self, device: Device) -> int:
        """Values of the adapter that the device trains, without its head."""
        facts = self.facts[device.id]
        layers = kept_layers(device.depth or facts.layers, facts.layers)
        rank = self.rank(device)
        shapes = adapter_shapes(facts, layers, self.fleet.adapter.roles, rank, self.method)
        trained = {key: shape for key, shape in shapes.items() if self.method.factor(key).trained}
        return sum(map(math.prod, trained.values()))


def run_arm(
    spec: Spec, arm: Arm, seed: int, files: Path, models: Path, folder: Path, bases: Bases
) -> Outcome:
    """Train one arm with one seed.

    Args:
        files: folder of the data; models: where relative paths of models are looked for.
        folder: for what devices and node write; emptied before and deleted after.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    fleet = _Run(spec, arm, seed, files, models, folder, bases)
    members = fleet.go()
    shutil.rmtree(folder)
    seconds = time.monotonic() - began
    return Outcome(
        arm=arm.name,
        seed=seed,
        digest=spec.digest(arm, seed),
        seconds=seconds,
        members=members,
        machine=processor(),
        code=code(),
        moved=fleet.moved,
        cosines=fleet.cosines,
    )
