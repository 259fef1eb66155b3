"""A study's file: its devices, the rows they hold, and the arms that are compared.

[study]      about, seeds, weights
[fleet], [adapter], [training], [head]   as in a fleet file; they hold for every arm
[data.NAME]  a task: files of training and test rows, which of their fields is the label, how many rows
[public]     public texts: rows of a file that every device may see, without their labels
[[device]]   id, model, rank, task, and the domains that its rows are of
[[arm]]      a line of the table: its method and its changes to the fleet tables
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_runtime import methods, settings
from edge_runtime.errors import InputError

# Raise this number by one with every change after which the same study file gives different
# figures: in the trainer, the methods, the codec, the merge, the kernels, the draw of rows, or a
# default of any key. Runs that carry another number are neither tabled nor paired with new
# runs, and are made again. Where the figures of arms with predictions of a head alone change,
# raise OF_PREDICTIONS in its place.
COMPUTATION = 3
OF_PREDICTIONS = 1
PUBLIC = "public.jsonl"
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of the file. Its defaults are left out of digests, so a new key leaves old runs as they are."""


class Data(Table, frozen=True):
    """A task. File names start from the data folder."""

    train: str
    test: str
    per_label: AtLeastOne | None = None  # training rows of each label on a device; None: rows / labels
    rows: AtLeastOne = 1000  # training rows on a device, where per_label is None
    # Held-out rows that devices are asked before each round; after the last they are asked all.
    test_rows: AtLeastOne = 600
    label: str = "label"  # field of a row that is its label


class PublicTexts(Table, frozen=True):
    """Public texts, drawn evenly over the labels of a file."""

    file: str
    texts: AtLeastOne


class Device(Table, frozen=True):
    """A virtual device."""

    id: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]+$")]
    source: str  # of the model, as in a catalog
    data: str  # name of its task
    first: int | None = None  # the model is cut to its first layers, this many; None: it is not cut
    depth: int | None = None  # layers of the depth slice that the device holds; None: all
    rank: int | None = None  # of its adapter; None: the file's
    domains: tuple[str, ...] = ()  # its rows have one of these domains; (): any

    @property
    def model(self) -> str:
        """The checkpoint's name in the fleet's catalog."""
        return self.source if self.first is None else f"the first {self.first} layers of {self.source}"


class Arm(Table, frozen=True):
    """A line of the table. Keys of its fleet tables replace the file's, or add to them."""

    name: str
    control: str | None = None  # name of the arm that it is compared to
    # The seed on whose held-out rows its settings were chosen: its claim leaves that seed out.
    chosen_on: int | None = None
    # The ceiling: a device of each model holds all devices' rows and makes all their steps.
    pooled: bool = False
    method: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    training: dict[str, Any] = {}
    codistill: dict[str, Any] | None = None
    head: dict[str, Any] = {}
    # Unset, these keys are left out of digests.
    codec: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    public: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Study(Table, frozen=True):
    """The [study] table."""

    about: str  # Markdown for the report
    seeds: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)] = (0, 1, 2)
    weights: settings.Weights = "bfloat16"  # format of the base models


class Spec(Table, frozen=True):
    """The whole file. Digests depend on the order of fields here and above."""

    study: Study
    data: dict[str, Data]
    device: tuple[Device, ...]
    arm: tuple[Arm, ...]
    fleet: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    training: dict[str, Any] = {}
    head: dict[str, Any] | None = None
    public: PublicTexts | None = None

    def fleet_of(self, arm: Arm, seed: int) -> settings.Fleet:
        """The fleet that an arm trains as; raises InputError for tables that do not fit."""
        adapter = {**self.adapter}
        if "rank" not in arm.adapter:
            default = adapter.get("rank", settings.Adapter().rank)
            rank, *lower = sorted({device.rank or default for device in self.device}, reverse=True)
            adapter |= {"rank": rank, **({"lower": lower} if lower else {})}
        tables: dict[str, Any] = {
            "fleet": {"name": "study", "seed": seed, **self.fleet},
            "catalog": [{"source": device.model, "depth": device.depth} for device in self.device],
            "method": arm.method,
            "adapter": {**adapter, **arm.adapter},
            "training": {**self.training, **arm.training},
        }
        if self.head is not None:
            tables["head"] = {**self.head, **arm.head}
        if arm.codistill is not None:
            tables["codistill"] = arm.codistill
        if arm.codec is not msgspec.UNSET:
            tables["codec"] = arm.codec
        if self.public is not None and self.uses_public(arm):
            public = {} if arm.public is msgspec.UNSET else arm.public
            tables["public"] = {"file": PUBLIC, "texts": self.public.texts, **public}
        fleet = settings.parse(tables)
        if self._framed(arm):
            return msgspec.structs.replace(fleet, rounds=fleet.rounds + 1)
        return fleet

    def uses_public(self, arm: Arm) -> bool:
        """Whether an arm's devices use the public texts."""
        return arm.codistill is not None or self._framed(arm)

    def _framed(self, arm: Arm) -> bool:
        """Whether an arm's models share a frame, which takes a round of its own."""
        method = methods.METHODS.get(arm.method.get("name", settings.MethodChoice().name))
        return arm.head.get("shared") == "fleet" or (method is not None and method.aligned)

    def digest(self, arm: Arm, seed: int, contents: Mapping[str, str]) -> str:
        """COMPUTATION, a dash, and a hash of all that the arm's result depends on.

        contents: digests of the files and models that this file names, by their names.
        """
        used = msgspec.structs.replace(
            self,
            study=msgspec.structs.replace(self.study, about="", seeds=(seed,)),
            arm=(msgspec.structs.replace(arm, control=None, chosen_on=None),),
            public=self.public if self.uses_public(arm) else None,
        )
        named = {name: contents[name] for name in sorted({*used.files, *used.sources})}
        predicts = self.head is not None and arm.codistill is not None
        encoded = msgspec.json.encode([used, named, *[OF_PREDICTIONS] * predicts])
        return f"{COMPUTATION}-{hashlib.sha256(encoded).hexdigest()[:12]}"

    @property
    def files(self) -> set[str]:
        """Names of the data files."""
        public = {self.public.file} if self.public else set()
        return public.union(*({task.train, task.test} for task in self.data.values()))

    @property
    def sources(self) -> set[str]:
        """The models, as in a catalog."""
        return {device.source for device in self.device}


def load(path: Path) -> Spec:
    """Read and check a study's file; raises InputError naming the key or name that does not fit."""
    tables = settings.read_toml(path, f"the study {path}")
    try:
        spec = msgspec.convert(tables, Spec)
        for fault in _faults(spec):
            raise InputError(fault)
        for arm in spec.arm:
            methods.of(spec.fleet_of(arm, 0))
    except (msgspec.ValidationError, InputError) as error:
        raise InputError(f"{path}: {error}") from error
    return spec


def _faults(spec: Spec) -> Iterator[str]:
    """Sentences about parts of the file that do not fit each other."""
    rank, names = spec.adapter.get("rank"), [arm.name for arm in spec.arm]
    slugs, ids = [slug(name) for name in names], [device.id for device in spec.device]
    if "seed" in spec.fleet:
        yield "[fleet] seed is each run's own; write the seeds into [study]"
    if rank is not None and all(device.rank not in (None, rank) for device in spec.device):
        yield f"[adapter] rank is {rank}, but every device has another one of its own"
    for name in [name for names in (slugs, ids) for name in names if names.count(name) > 1]:
        yield f"two arms or two devices are called `{name}`, as far as a file's name can tell"
    for arm in spec.arm:
        if arm.control is not None and arm.control not in names:
            yield f"the arm `{arm.name}` has the control `{arm.control}`, which is not there"
        if spec.public is None and spec.uses_public(arm):
            yield f"the arm `{arm.name}` uses public texts, which needs [public]"
        if arm.head and spec.head is None:
            yield f"the arm `{arm.name}` has a head, but the file has no [head]"
    for device in spec.device:
        if device.data not in spec.data:
            yield f"the device {device.id} has data `{device.data}`, but there is no [data.{device.data}]"


def slug(name: str) -> str:
    """An arm's name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def chosen(spec: Spec, seeds: str | None, arms: str | None) -> Spec:
    """The study with some of its arms, and with these seeds.

    Args:
        seeds: numbers separated by commas; None: the file's.
        arms: names or slugs separated by commas; None: all. The slug stands for a name that has a
            comma.

    Raises:
        InputError: the file has no such arm, or a seed is not a number.
    """
    try:
        numbers = tuple(dict.fromkeys(map(int, seeds.split(",")))) if seeds else spec.study.seeds
    except ValueError as error:
        raise InputError(f"--seeds is {seeds!r}, but has to be numbers such as 0,1,2") from error
    by_slug = {slug(arm.name): arm for arm in spec.arm}
    slugs = [slug(name) for name in arms.split(",")] if arms else list(by_slug)
    for name in slugs:
        if name not in by_slug:
            raise InputError(f"the study has no arm `{name}`; it has {', '.join(by_slug)}")
    study = msgspec.structs.replace(spec.study, seeds=numbers)
    selected = tuple(arm for name, arm in by_slug.items() if name in slugs)
    return msgspec.structs.replace(spec, study=study, arm=selected)
