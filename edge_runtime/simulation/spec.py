"""A study's file: which devices there are, what they hold, and which arms are compared.

[study]      seeds, about; fleet tables beside it are every arm's: [fleet] [adapter] [training] [head] ...
[data.NAME]  train and test files under --data; per_label rows of each label a device; test_rows or test_per_label
[anchors]    rows of a file that every device may see, without their labels
[[device]]   id, source, first, depth, rank, data, and the domains it is confined to
[[arm]]      name, control; its own fleet tables; pooled: the ceiling
"""

import hashlib
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_runtime import methods, settings
from edge_runtime.errors import InputError
from edge_runtime.trainer import data

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Raise this number by one with every change after which the same study file gives different figures: in the trainer, the
# methods, the codec, the merge, the kernels, or the way rows are drawn. Runs that carry a lower number are then neither
# tabled nor paired with new runs, and are made again.
COMPUTATION = 1
ANCHORS = "anchors.jsonl"
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task. per_label: training rows of each label for a device; None: rows / labels, or
    as many as there are for each of those that hold the data. test_rows: 0 for all. test_per_label: as many of each label
    instead, so that a device which has learned nothing is right by chance, whatever it says; left out of digests where the
    file has none."""

    train: str
    test: str
    per_label: AtLeastOne | None = None
    rows: AtLeastOne = 1000
    test_rows: Annotated[int, msgspec.Meta(ge=0)] = 0
    test_per_label: AtLeastOne | msgspec.UnsetType = msgspec.UNSET


class Anchors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Public texts: so many rows of a file, evenly drawn over its labels."""

    file: str
    rows: AtLeastOne


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """first: the model is cut to so many of its first layers; depth: the slice of it that the device holds. domains: of its
    rows' `domain`; none for all."""

    id: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]+$")]
    source: str
    data: str
    first: int | None = None
    depth: int | None = None
    rank: int | None = None
    domains: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """What stands for its checkpoint in a fleet's catalog."""
        return self.source if self.first is None else f"the first {self.first} layers of {self.source}"


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the table. control: the arm it is judged against. pooled: a device of each model holds all
    devices' rows, and makes all their steps. The tables take the place of the file's, or add to them."""

    name: str
    control: str | None = None
    pooled: bool = False
    method: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    training: dict[str, Any] = {}
    codistill: dict[str, Any] | None = None
    head: dict[str, Any] = {}


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The [study] table."""

    about: str
    seeds: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)] = (0, 1, 2)
    weights: settings.Weights = "bfloat16"


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. fleet: the tables that every arm has."""

    study: Study
    data: dict[str, Data]
    device: tuple[Device, ...]
    arm: tuple[Arm, ...]
    fleet: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    training: dict[str, Any] = {}
    head: dict[str, Any] | None = None
    anchors: Anchors | None = None

    def fleet_of(self, arm: Arm, seed: int) -> settings.Fleet:
        """The fleet an arm trains as; raises InputError for what does not fit."""
        catalog = [
            {"source": one.model, **({"depth": one.depth} if one.depth else {})} for one in self.device
        ]
        default = self.adapter.get("rank", settings.Adapter().rank)
        rank, *lower = sorted({device.rank or default for device in self.device}, reverse=True)
        ranks = {"rank": rank, **({"lower": lower} if lower else {})}
        adapter = {**self.adapter, **({} if "rank" in arm.adapter else ranks), **arm.adapter}
        tables: dict[str, Any] = {
            "fleet": {"name": "study", "seed": seed, **self.fleet},
            "catalog": catalog,
            "method": arm.method,
            "adapter": adapter,
            "training": {**self.training, **arm.training},
        }
        if self.head is not None:
            tables["head"] = {**self.head, **arm.head}
        if arm.codistill is not None:
            tables["codistill"] = {
                "anchors": ANCHORS,
                "texts": self.anchors.rows if self.anchors else 0,
                **arm.codistill,
            }
        return settings.parse(tables)

    def digest(self, arm: Arm, seed: int) -> str:
        """What a result depends on: COMPUTATION, a dash, and a hash of all in this file that the arm's run reads."""
        anchors = self.anchors if arm.codistill is not None else None
        of = msgspec.structs.replace(self, arm=(msgspec.structs.replace(arm, control=None),), anchors=anchors)
        study = msgspec.structs.replace(self.study, about="", seeds=(seed,))
        content = msgspec.json.encode(msgspec.structs.replace(of, study=study))
        return f"{COMPUTATION}-{hashlib.sha256(content).hexdigest()[:12]}"


def load(path: Path) -> Spec:
    """Read and check a study's file; raises InputError naming what does not fit."""
    try:
        spec = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Spec)
        for arm in spec.arm:
            if arm.codistill is not None and spec.anchors is None:
                raise InputError(f"the arm `{arm.name}` distils, which needs [anchors]")
            if arm.head and spec.head is None:
                raise InputError(f"the arm `{arm.name}` has a head, but the file has no [head]")
            methods.of(spec.fleet_of(arm, 0))
    except OSError as error:
        raise InputError(f"cannot read the study {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, InputError) as error:
        raise InputError(f"{path}: {error}") from error
    if "seed" in spec.fleet:
        raise InputError(f"{path}: [fleet] seed is each run's own; write the seeds into [study]")
    if "rank" in spec.adapter and all(
        device.rank not in (None, spec.adapter["rank"]) for device in spec.device
    ):
        raise InputError(
            f"{path}: [adapter] rank is {spec.adapter['rank']}, but every device has another one of its own"
        )
    names, ids = [slug(arm.name) for arm in spec.arm], [device.id for device in spec.device]
    for twice in [name for name in names if names.count(name) > 1] + [
        one for one in ids if ids.count(one) > 1
    ]:
        raise InputError(
            f"{path}: two arms or two devices are called `{twice}`, as far as a file's name can tell"
        )
    for arm in spec.arm:
        if arm.control is not None and arm.control not in [other.name for other in spec.arm]:
            raise InputError(
                f"{path}: the arm `{arm.name}` has the control `{arm.control}`, which is not there"
            )
    for name, task in spec.data.items():
        if task.test_rows and task.test_per_label:
            raise InputError(f"{path}: [data.{name}] has test_rows and test_per_label; leave one of them out")
    for device in spec.device:
        if device.data not in spec.data:
            raise InputError(
                f"{path}: the device {device.id} has data `{device.data}`, but there is no [data.{device.data}]"
            )
    return spec


def slug(name: str) -> str:
    """An arm's name as it stands in the names of files."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def chosen(spec: Spec, seeds: str | None, arms: str | None) -> Spec:
    """The study with some of its seeds and arms, the arms by name or by slug (a name may hold a comma).

    Raises:
        InputError: an arm that it has not, or what is no seed.
    """
    try:
        numbers = tuple(dict.fromkeys(map(int, seeds.split(",")))) if seeds else spec.study.seeds
    except ValueError as error:
        raise InputError(f"--seeds is {seeds!r}, but has to be numbers such as 0,1,2") from error
    known = {slug(arm.name): arm for arm in spec.arm}
    names = [slug(name) for name in arms.split(",")] if arms else list(known)
    for name in names:
        if name not in known:
            raise InputError(f"the study has no arm `{name}`; it has {', '.join(known)}")
    study = msgspec.structs.replace(spec.study, seeds=numbers)
    return msgspec.structs.replace(
        spec, study=study, arm=tuple(arm for name, arm in known.items() if name in names)
    )


def with_seeds(spec: Spec, seeds: tuple[int, ...]) -> Spec:
    """The study with these seeds besides its own."""
    every = tuple(dict.fromkeys((*spec.study.seeds, *seeds)))
    return msgspec.structs.replace(spec, study=msgspec.structs.replace(spec.study, seeds=every))


def shares(spec: Spec, folder: Path, seed: int) -> dict[str, list[data.Row]]:
    """The training rows of each device, by its id: no row is on two of them.

    folder: of the data files.
    """
    found: dict[str, list[data.Row]] = {device.id: [] for device in spec.device}
    for name, task in spec.data.items():
        holders = [device for device in spec.device if device.data == name]
        by_label: dict[str, list[data.Row]] = defaultdict(list)
        for row in _labelled(folder / task.train):
            by_label[row["label"]].append(row)
        for label, rows in sorted(by_label.items()):
            mixed = random.Random(f"{seed}/{name}/{label}").sample(rows, len(rows))
            those = [d for d in holders if not d.domains or mixed[0].get("domain") in d.domains]
            each = task.per_label or -(-task.rows // len(by_label))
            each = min(each, len(mixed) // max(len(those), 1))
            for number, device in enumerate(those):
                found[device.id] += mixed[number * each : (number + 1) * each]
    for name, mine in found.items():
        if not mine:
            raise InputError(f"the device {name} has no rows: its domains are not in its data")
    return {
        name: [{"text": row["text"], "label": row["label"]} for row in mine] for name, mine in found.items()
    }


def anchors(spec: Spec, folder: Path) -> list[data.Row]:
    """The public texts, without labels."""
    if spec.anchors is None:
        return []
    rows = data.read_rows(folder / spec.anchors.file)
    drawn = _evenly(rows, -(-spec.anchors.rows // len({row.get("label", "") for row in rows})))
    if len(drawn) < spec.anchors.rows:
        raise InputError(
            f"[anchors] rows is {spec.anchors.rows}, but {spec.anchors.file} gives {len(drawn)} that are spread evenly over its "
            "labels"
        )
    return [{"text": row["text"]} for row in random.Random(0).sample(drawn, spec.anchors.rows)]


def test_rows(task: Data, folder: Path) -> list[data.Row]:
    """A task's held-out rows, the same for every arm and seed."""
    rows = _labelled(folder / task.test)
    if task.test_per_label:
        drawn = _evenly(rows, task.test_per_label)
        label, count = Counter(row["label"] for row in drawn).most_common()[-1]
        if count < task.test_per_label:
            raise InputError(
                f"test_per_label is {task.test_per_label}, but {task.test} has {count} rows of `{label}`"
            )
    else:
        drawn = random.Random(0).sample(rows, min(task.test_rows or len(rows), len(rows)))
    return [{"text": row["text"], "label": row["label"]} for row in drawn]


def _evenly(rows: list[data.Row], each: int) -> list[data.Row]:
    """So many rows of each label, or as many as there are."""
    by_label: dict[str, list[data.Row]] = defaultdict(list)
    for row in rows:
        by_label[row.get("label", "")].append(row)
    return [
        row
        for label, rows in sorted(by_label.items())
        for row in random.Random(label).sample(rows, min(each, len(rows)))
    ]


def _labelled(path: Path) -> list[data.Row]:
    rows = data.read_rows(path)
    for number, row in enumerate(rows, 1):
        if "label" not in row:
            raise InputError(f"row {number} of {path} has no label, which a study needs")
    return rows


def check_files(spec: Spec, folder: Path) -> None:
    """Raise InputError for data that the runs could not use."""
    for seed in spec.study.seeds:
        shares(spec, folder, seed)
    for task in spec.data.values():
        test_rows(task, folder)
    anchors(spec, folder)
