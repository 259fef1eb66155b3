"""fleet.toml, typed: what a fleet trains, how, and for how many rounds.

    [fleet]     name, rounds, quorum, deadline_s, seed
    [method]    name and its settings
    [adapter]   rank, lower, alpha, roles
    [head]      shared: of text and label rows, where there is a head for them
    [training]  steps, rows_a_step, learning_rate, max_tokens, shorter, ...
    [codistill] anchors, texts, rows, weight, across: of learning from what other devices predict
    [[catalog]] models in order of preference: source, depth, weights

The node sends all of it to the devices in its round message, so a device is configured by the broker's address alone.
"""

import difflib
import sys
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
Boundaries = Literal["input", "int8"]  # how each block's input is kept for backward
MOST_TEXTS = 1 << 20
MOST_TOKENS = 1 << 16  # of all completions: as JSON they are below what a payload may hold
PACKED = ("q8_0", "q4_1", "q4_0", "nf4")  # block formats of edge_kernels.quant


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the catalog.

    source: a folder, a GGUF file or a hub id; relative paths are looked for in the device's models folder.
    depth: layers to keep; None keeps all.
    weights: formats a device may hold the frozen base in, most precise first.
    """

    source: str
    depth: int | None = None
    weights: tuple[Weights, ...] = ("float32", "bfloat16")


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which federated method, by its name in edge_runtime.methods, and settings of its own, which its file describes."""

    name: str = "fedit"
    settings: dict[str, Any] = {}


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the fleet has a [head], rows of text and label are learned by a linear head over the labels, and not as text.

    shared: each label's row within the model class, or with nobody.
    """

    shared: Literal["class", "private"] = "class"


class Codistill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the fleet has a [codistill], devices of all models learn what the others say of public texts: which label they
    have, with a [head]; without one, how they go on.

    anchors: a .jsonl file on the node (aggregator/anchors.py); texts: how many of them, the first. rows: of them in a step,
    beside the device's own; weight: of their mean loss beside that of its own; both in the last round, up to which they grow,
    but for labels that a device has no rows of (methods/codistill.py). temperature: of the targets of labels, which are surer
    below 1. tokens: of a completion with its end; a longer one does not count. across: between models; or, for comparison,
    among devices of one model alone.
    """

    anchors: str
    texts: int = 300
    rows: int = 16
    weight: float = 2.0
    temperature: float = 0.5
    tokens: int = 32
    across: bool = True


class Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The adapter every device trains: y = W x + (alpha / rank) B C A x on each linear layer of these roles.

    lower: ranks, falling, that a device may take where `rank` does not fit; only for methods that merge unequal ranks or
    exchange nothing.
    """

    rank: int = 16
    lower: tuple[int, ...] = ()
    alpha: float = 32.0
    roles: tuple[Role, ...] = get_args(Role)

    def at(self, rank: int) -> "Adapter":
        """A device's own, of this rank; alpha / rank stays the fleet's."""
        return msgspec.structs.replace(self, rank=rank, alpha=self.alpha * rank / self.rank)


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One round of local training.

    steps: optimiser steps a round. rows_a_step: rows whose gradients make one step. max_tokens: longer rows are cut.
    shorter: lengths, falling, that a device may cut to where max_tokens does not fit.
    step_deadline_s: what a device takes is predicted to make a step within so many seconds; None: however long it takes.
    slices: whose loss a step takes, the device's own slice's, or in turn ("nested") also that of every smaller slice the
    catalog has of the same checkpoint, so that what travels fits the smaller devices too (models/slices.py).
    learning_rate: the peak; it warms up over warmup_steps and falls along a cosine to a tenth over all rounds.
    """

    steps: int = 20
    rows_a_step: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_tokens: int = 512
    shorter: tuple[int, ...] = ()
    slices: Literal["own", "nested"] = "nested"
    timeout_s: float = 3600.0
    step_deadline_s: float | None = None


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fleet as its node runs it.

    quorum: updates a round needs before it may close. deadline_s: how long a round waits for the devices that are online;
    extensions: how often a round below quorum is given another deadline before the node gives up.
    """

    name: str
    catalog: tuple[Model, ...]
    rounds: int = 3
    quorum: int = 1
    deadline_s: float = 600.0
    extensions: int = 3
    seed: int = 0
    method: Method = Method()
    adapter: Adapter = Adapter()
    training: Training = Training()
    head: Head | None = None
    codistill: Codistill | None = None


def rows_of_a_step(training: Training, codistill: Codistill | None) -> int:
    """A device's own and the public texts beside them."""
    return training.rows_a_step + (codistill.rows if codistill is not None else 0)


def load(path: Path) -> Fleet:
    """Read and check a fleet file.

    The path of public texts starts from its own folder.

    Raises:
        InputError: the file is missing, is not TOML, or has a key or value that does not fit, which is named.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the fleet file {path}: {error.strerror}; give its path with --fleet"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    try:
        fleet = parse(tables)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if fleet.codistill is None:
        return fleet
    anchors = str(path.parent / fleet.codistill.anchors)  # from the fleet file's folder
    return msgspec.structs.replace(fleet, codistill=msgspec.structs.replace(fleet.codistill, anchors=anchors))


def parse(tables: dict[str, Any]) -> Fleet:
    """Make a Fleet of the tables of a fleet file; raises InputError naming the key, the value seen and what is needed."""
    fields = dict(tables)
    head = fields.pop("fleet", {})
    for name in ("fleet", "method", "adapter", "training", "head", "codistill"):
        if not isinstance(tables.get(name, {}), dict):
            raise InputError(f"`{name}` is a table: write [{name}] on a line of its own and its keys below")
    allowed = {"fleet", "catalog", "method", "adapter", "training", "head", "codistill"}
    own = set(Fleet.__struct_fields__) - allowed
    refuse_unknown(fields, allowed, "")
    refuse_unknown(head, own, "[fleet] ")
    method = fields.get("method", {})
    fields["method"] = {"settings": {key: value for key, value in method.items() if key != "name"}}
    fields["method"] |= {"name": method["name"]} if "name" in method else {}
    for table, kind in (
        ("adapter", Adapter),
        ("training", Training),
        ("head", Head),
        ("codistill", Codistill),
    ):
        refuse_unknown(fields.get(table, {}), set(kind.__struct_fields__), f"[{table}] ")
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
    """Raise InputError naming the first key that is not known, and the known one that it is most like."""
    for key in table if isinstance(table, dict) else ():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(sorted(allowed))}"
            raise InputError(f"{where}has no key `{key}`{hint}".lstrip())


def _check(fleet: Fleet) -> None:
    training, adapter = fleet.training, fleet.adapter
    rules = [
        ("[[catalog]]", len(fleet.catalog), len(fleet.catalog) >= 1, "at least one model"),
        ("[fleet] rounds", fleet.rounds, fleet.rounds >= 1, "1 or more"),
        ("[fleet] quorum", fleet.quorum, fleet.quorum >= 1, "1 or more"),
        (
            "[fleet] deadline_s",
            fleet.deadline_s,
            0 < fleet.deadline_s < float("inf"),
            "a number of seconds above 0",
        ),
        ("[fleet] extensions", fleet.extensions, fleet.extensions >= 0, "0 or more"),
        ("[adapter] rank", adapter.rank, 1 <= adapter.rank <= 256, "1 to 256"),
        (
            "[adapter] lower",
            adapter.lower,
            _fall((adapter.rank, *adapter.lower), 1),
            f"ranks that fall, from below rank ({adapter.rank}) to 1 or more",
        ),
        ("[adapter] alpha", adapter.alpha, 0 < adapter.alpha < float("inf"), "a number above 0"),
        ("[adapter] roles", adapter.roles, len(adapter.roles) >= 1, "at least one role"),
        ("[training] steps", training.steps, training.steps >= 1, "1 or more"),
        ("[training] rows_a_step", training.rows_a_step, training.rows_a_step >= 1, "1 or more"),
        (
            "[training] learning_rate",
            training.learning_rate,
            0 < training.learning_rate < 1,
            "between 0 and 1",
        ),
        ("[training] warmup_steps", training.warmup_steps, training.warmup_steps >= 0, "0 or more"),
        (
            "[training] weight_decay",
            training.weight_decay,
            0 <= training.weight_decay < 1,
            "0 or more, and below 1",
        ),
        (
            "[training] clip_norm",
            training.clip_norm,
            0 < training.clip_norm < float("inf"),
            "a number above 0",
        ),
        ("[training] max_tokens", training.max_tokens, training.max_tokens >= 8, "8 or more"),
        (
            "[training] shorter",
            training.shorter,
            _fall((training.max_tokens, *training.shorter), 8),
            f"lengths that fall, from below max_tokens ({training.max_tokens}) to 8 or more",
        ),
        (
            "[training] timeout_s",
            training.timeout_s,
            0 < training.timeout_s < float("inf"),
            "seconds above 0",
        ),
        (
            "[training] step_deadline_s",
            training.step_deadline_s,
            training.step_deadline_s is None or 0 < training.step_deadline_s < float("inf"),
            "seconds above 0",
        ),
    ]
    if fleet.codistill is not None:
        texts, rows, weight = fleet.codistill.texts, fleet.codistill.rows, fleet.codistill.weight
        temperature = fleet.codistill.temperature
        rules.append(("[codistill] texts", texts, 1 <= texts <= MOST_TEXTS, f"1 to {MOST_TEXTS}"))
        rules.append(("[codistill] rows", rows, rows >= 1, "1 or more"))
        rules.append(("[codistill] weight", weight, 0 < weight < float("inf"), "a number above 0"))
        if fleet.head is None:
            tokens, most = fleet.codistill.tokens, min((training.max_tokens, *training.shorter)) - 8
            rules.append(
                (
                    "[codistill] texts x tokens",
                    texts * tokens,
                    texts * tokens <= MOST_TOKENS,
                    f"{MOST_TOKENS} or less",
                )
            )
            rules.append(
                (
                    "[codistill] tokens",
                    tokens,
                    2 <= tokens <= most,
                    f"2 to {most}, as rows are cut to {most + 8}",
                )
            )
        rules.append(("[codistill] temperature", temperature, 0.05 <= temperature <= 20, "0.05 to 20"))
    for model in fleet.catalog:
        depth = model.depth if model.depth is not None else 1
        rules.append((f"[[catalog]] depth of {model.source}", depth, depth >= 1, "1 or more layers"))
        rules.append(
            (
                f"[[catalog]] weights of {model.source}",
                model.weights,
                bool(model.weights),
                "at least one format",
            )
        )
    for name, seen, holds, needed in rules:
        if not holds:
            raise InputError(f"{name} is {seen}, but has to be {needed}")


def _fall(numbers: tuple[int, ...], least: int) -> bool:
    """Whether each is below the one before, and those after the first are no less than `least`."""
    return all(above > below >= least for above, below in pairwise(numbers))
