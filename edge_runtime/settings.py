"""fleet.toml, typed: what a fleet trains, how, and for how many rounds.

    [fleet]     name, rounds, quorum, deadline_s, seed
    [method]    name and its settings
    [adapter]   rank, lower, alpha, roles
    [head]      shared: of text and label rows, where there is a head for them
    [training]  steps, rows_a_step, learning_rate, max_tokens, shorter, ...
    [codistill] anchors, texts, rows, weight, across: of learning from what other devices predict
    [[catalog]] models in order of preference: source, depth, weights

The node sends all of it to the devices in its round message, so a device is configured by the
broker's address alone.
"""

import difflib
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from edge_runtime.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2"]
Weights = Literal["float32", "bfloat16", "q8_0", "q4_1", "q4_0", "nf4"]
Boundaries = Literal["input", "int8"]  # form in which each block's input is kept for backward
MOST_TEXTS = 1 << 20
MOST_TOKENS = 1 << 16  # of all completions together: as JSON they are smaller than a payload may be
PACKED = ("q8_0", "q4_1", "q4_0", "nf4")  # block formats of edge_kernels.quant


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the catalog."""

    # A folder, a GGUF file or a hub id; relative paths start from the device's models folder.
    source: str
    depth: int | None = None  # layers to keep; None: all
    # Formats that a device may hold the frozen base in, most precise first.
    weights: tuple[Weights, ...] = ("float32", "bfloat16")


class MethodChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A federated method."""

    name: str = "fedit"  # as in edge_runtime.methods
    settings: dict[str, Any] = {}  # the table's other keys, which the method's file describes


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear head over the labels; without it, rows of text and label are learned as text."""

    # Who shares each label's row: the devices of a model class, or nobody.
    shared: Literal["class", "private"] = "class"


class Codistill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices of all models learn from each other's predictions on public texts.

    With a [head] a prediction is a label, without it a completion. rows and weight are those of the
    last round; they grow up to it, but for labels that a device has no rows of
    (methods/codistill.py).
    """

    anchors: str  # path of the public texts on the node, a .jsonl file (aggregator/anchors.py)
    texts: int = 300  # public texts in use: the file's first
    rows: int = 16  # public texts in a step, beside the device's rows
    weight: float = 2.0  # of the public texts' mean loss, beside the mean loss of the device's rows
    temperature: float = 0.5  # of label targets; below 1 they are surer
    tokens: int = 32  # of a completion with its end; longer completions do not count
    across: bool = True  # between models; false: among devices of one model, for comparison


class Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The adapter on each linear layer of the roles: y = W x + (alpha / rank) B C A x."""

    rank: int = 16
    # Falling ranks for devices that `rank` does not fit; only for methods that merge unequal ranks
    # or exchange nothing.
    lower: tuple[int, ...] = ()
    alpha: float = 32.0
    roles: tuple[Role, ...] = get_args(Role)

    def at(self, rank: int) -> "Adapter":
        """The adapter at another rank; alpha / rank stays the fleet's."""
        return msgspec.structs.replace(self, rank=rank, alpha=self.alpha * rank / self.rank)


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A round of local training."""

    steps: int = 20  # optimiser steps a round
    rows_a_step: int = 16  # rows whose gradients make a step
    learning_rate: float = 1e-3  # the peak; it falls along a cosine to a tenth over all rounds
    warmup_steps: int = 4  # steps in which the learning rate rises to the peak
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_tokens: int = 512  # longer rows are cut
    shorter: tuple[int, ...] = ()  # falling lengths for devices that max_tokens does not fit
    # Slices whose loss a step takes: the device's alone, or in turn also each smaller slice that
    # the catalog has of the checkpoint, so that the delta fits smaller devices too
    # (models/slices.py).
    slices: Literal["own", "nested"] = "nested"
    timeout_s: float = 3600.0
    step_deadline_s: float | None = None  # predicted seconds that a step may take; None: no limit


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fleet as its node runs it."""

    name: str
    catalog: tuple[Model, ...]
    rounds: int = 3
    quorum: int = 1  # updates that a round needs before it may close
    deadline_s: float = 600.0  # seconds that a round waits for devices that are online
    extensions: int = 3  # further deadlines for a round below quorum, before the node gives up
    seed: int = 0
    method: MethodChoice = MethodChoice()
    adapter: Adapter = Adapter()
    training: Training = Training()
    head: Head | None = None
    codistill: Codistill | None = None


TABLES: dict[str, Any] = {
    "method": MethodChoice,
    "adapter": Adapter,
    "training": Training,
    "head": Head,
    "codistill": Codistill,
}


def rows_of_a_step(training: Training, codistill: Codistill | None) -> int:
    """Rows of a step: the device's, and the public texts beside them."""
    return training.rows_a_step + (codistill.rows if codistill is not None else 0)


def load(path: Path) -> Fleet:
    """Read and check a fleet file; the path of public texts starts from the file's folder.

    Raises:
        InputError: the file is missing or is not TOML, or a key or value does not fit; it is named.
    """
    tables = read_toml(path, f"the fleet file {path}", "; give its path with --fleet")
    try:
        fleet = parse(tables)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if fleet.codistill is None:
        return fleet
    anchors = str(path.parent / fleet.codistill.anchors)
    return msgspec.structs.replace(fleet, codistill=msgspec.structs.replace(fleet.codistill, anchors=anchors))


def read_toml(path: Path, name: str, advice: str = "") -> dict[str, Any]:
    """The tables of a TOML file; raises InputError naming the file, and saying what to do."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}{advice}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error


def parse(tables: dict[str, Any]) -> Fleet:
    """Make a Fleet of a fleet file's tables; raises InputError naming key, value and need."""
    fields = dict(tables)
    head = fields.pop("fleet", {})
    for name in ("fleet", *TABLES):
        if not isinstance(tables.get(name, {}), dict):
            raise InputError(f"`{name}` is a table: write [{name}] on a line of its own and its keys below")
    allowed = {"fleet", "catalog", *TABLES}
    refuse_unknown(fields, allowed, "")
    refuse_unknown(head, set(Fleet.__struct_fields__) - allowed, "[fleet] ")
    method = fields.get("method", {})
    fields["method"] = {"settings": {key: value for key, value in method.items() if key != "name"}}
    fields["method"] |= {"name": method["name"]} if "name" in method else {}
    for name in ("adapter", "training", "head", "codistill"):
        refuse_unknown(fields.get(name, {}), set(TABLES[name].__struct_fields__), f"[{name}] ")
    if not isinstance(fields.get("catalog", []), list):
        raise InputError(
            "`catalog` is a list of models: write [[catalog]] on a line of its own and the model's keys below"
        )
    for entry in fields.get("catalog", []):
        refuse_unknown(entry, set(Model.__struct_fields__), "[[catalog]] ")
    try:
        fleet = msgspec.convert({**fields, **head}, Fleet)
    except msgspec.ValidationError as error:
        raise InputError(f"{error}") from error
    _check(fleet)
    return fleet


def refuse_unknown(table: Any, allowed: set[str], where: str) -> None:
    """Raise InputError naming the first unknown key, and the known key that is most like it."""
    for key in table if isinstance(table, dict) else ():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(sorted(allowed))}"
            raise InputError(f"{where}has no key `{key}`{hint}".lstrip())


Rule = tuple[str, Any, bool, str]  # key, value seen, whether the value fits, value needed
INFINITE = float("inf")


def _check(fleet: Fleet) -> None:
    """Raise InputError for the first value that is out of bounds."""
    rules = [*_fleet_rules(fleet), *_adapter_rules(fleet.adapter), *_training_rules(fleet.training)]
    if fleet.codistill is not None:
        rules += _codistill_rules(fleet.codistill, fleet)
    for model in fleet.catalog:
        rules += _model_rules(model)
    for key, value, fits, needed in rules:
        if not fits:
            raise InputError(f"{key} is {value}, but has to be {needed}")


def _fleet_rules(fleet: Fleet) -> Iterator[Rule]:
    models, deadline_s = len(fleet.catalog), fleet.deadline_s
    yield "[[catalog]]", models, models >= 1, "at least one model"
    yield "[fleet] rounds", fleet.rounds, fleet.rounds >= 1, "1 or more"
    yield "[fleet] quorum", fleet.quorum, fleet.quorum >= 1, "1 or more"
    yield "[fleet] deadline_s", deadline_s, 0 < deadline_s < INFINITE, "a number of seconds above 0"
    yield "[fleet] extensions", fleet.extensions, fleet.extensions >= 0, "0 or more"


def _adapter_rules(adapter: Adapter) -> Iterator[Rule]:
    rank, lower, alpha = adapter.rank, adapter.lower, adapter.alpha
    falling = f"ranks that fall, from below rank ({rank}) to 1 or more"
    yield "[adapter] rank", rank, 1 <= rank <= 256, "1 to 256"
    yield "[adapter] lower", lower, _fall((rank, *lower), 1), falling
    yield "[adapter] alpha", alpha, 0 < alpha < INFINITE, "a number above 0"
    yield "[adapter] roles", adapter.roles, len(adapter.roles) >= 1, "at least one role"


def _training_rules(training: Training) -> Iterator[Rule]:
    rate, decay, clip = training.learning_rate, training.weight_decay, training.clip_norm
    longest, shorter = training.max_tokens, training.shorter
    timeout_s, deadline_s = training.timeout_s, training.step_deadline_s
    falling = f"lengths that fall, from below max_tokens ({longest}) to 8 or more"
    in_bounds = deadline_s is None or 0 < deadline_s < INFINITE
    yield "[training] steps", training.steps, training.steps >= 1, "1 or more"
    yield "[training] rows_a_step", training.rows_a_step, training.rows_a_step >= 1, "1 or more"
    yield "[training] learning_rate", rate, 0 < rate < 1, "between 0 and 1"
    yield "[training] warmup_steps", training.warmup_steps, training.warmup_steps >= 0, "0 or more"
    yield "[training] weight_decay", decay, 0 <= decay < 1, "0 or more, and below 1"
    yield "[training] clip_norm", clip, 0 < clip < INFINITE, "a number above 0"
    yield "[training] max_tokens", longest, longest >= 8, "8 or more"
    yield "[training] shorter", shorter, _fall((longest, *shorter), 8), falling
    yield "[training] timeout_s", timeout_s, 0 < timeout_s < INFINITE, "seconds above 0"
    yield "[training] step_deadline_s", deadline_s, in_bounds, "seconds above 0"


def _codistill_rules(codistill: Codistill, fleet: Fleet) -> Iterator[Rule]:
    texts, rows, weight, tokens = codistill.texts, codistill.rows, codistill.weight, codistill.tokens
    temperature = codistill.temperature
    yield "[codistill] texts", texts, 1 <= texts <= MOST_TEXTS, f"1 to {MOST_TEXTS}"
    yield "[codistill] rows", rows, rows >= 1, "1 or more"
    yield "[codistill] weight", weight, 0 < weight < INFINITE, "a number above 0"
    if fleet.head is None:  # predictions are completions
        total, length = texts * tokens, min((fleet.training.max_tokens, *fleet.training.shorter))
        needed = f"2 to {length - 8}, as rows are cut to {length}"
        yield "[codistill] texts x tokens", total, total <= MOST_TOKENS, f"{MOST_TOKENS} or less"
        yield "[codistill] tokens", tokens, 2 <= tokens <= length - 8, needed
    yield "[codistill] temperature", temperature, 0.05 <= temperature <= 20, "0.05 to 20"


def _model_rules(model: Model) -> Iterator[Rule]:
    depth = 1 if model.depth is None else model.depth
    yield f"[[catalog]] depth of {model.source}", depth, depth >= 1, "1 or more layers"
    yield f"[[catalog]] weights of {model.source}", model.weights, bool(model.weights), "at least one format"


def _fall(numbers: tuple[int, ...], least: int) -> bool:
    """Whether each number is below the one before it, and all after the first reach `least`."""
    return all(above > below >= least for above, below in pairwise(numbers))
