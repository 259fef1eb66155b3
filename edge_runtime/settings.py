"""fleet.toml, typed: what a fleet trains, how, and for how many rounds.

    [fleet]     name, rounds, quorum, deadline_s, seed
    [method]    name, server_step, momentum, and the method's own settings
    [adapter]   rank, lower, alpha, roles
    [head]      shared: of text and label rows, where there is a head for them
    [training]  steps, rows_a_step, learning_rate, max_tokens, shorter, ...
    [codec]     step: how coarsely deltas and versions are rounded
    [public]    file, texts: texts that every device may see
    [codistill] rows, weight, across: of learning from what other devices predict on them
    [[catalog]] models in order of preference: source, depth, weights

The node sends all of it to the devices in its round message, so a device is configured by the
broker's address alone.
"""

import difflib
import math
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from edge_broker import files, topics

from edge_runtime.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2"]
Weights = Literal["float32", "bfloat16", "q8_0", "q4_1", "q4_0", "nf4"]
Boundaries = Literal["input", "int8"]  # form in which each block's input is kept for backward
Backend = Literal["torch", "onnx"]  # what a server computes with
MOST_TOKENS = 1 << 16  # of all completions together: as JSON they are smaller than a payload may be
FINE_STEP = 2**-5  # as [codec] step; seven bits a value, for what no remainder follows
PACKED = ("q8_0", "q4_1", "q4_0", "nf4")  # block formats of edge_kernels.quant


class Bound(NamedTuple):
    """What a field's value has to be, beside its type; a value of None is not checked."""

    holds: Callable[[Any], bool]
    needed: str


Count = Annotated[int, Bound(lambda value: value >= 0, "0 or more")]
Positive = Annotated[int, Bound(lambda value: value >= 1, "1 or more")]
Factor = Annotated[float, Bound(lambda value: 0 < value < math.inf, "a number above 0")]
TopicName = Annotated[str, Bound(lambda name: re.fullmatch(topics.NAME, name), topics.NAME_FORM)]
PathText = Annotated[str, Bound(lambda text: "\0" not in text, "text without a NUL character")]
SECONDS = Bound(lambda value: 0 < value < math.inf, "a number of seconds above 0")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the catalog."""

    # A folder, a GGUF file or a hub id; relative paths start from the device's models folder.
    source: PathText
    # Layers to keep; None: all.
    depth: Annotated[int | None, Bound(lambda depth: depth >= 1, "1 or more layers")] = None
    # Formats that a device may hold the frozen base in, most precise first.
    weights: Annotated[tuple[Weights, ...], Bound(len, "at least one format")] = ("float32", "bfloat16")


class MethodChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A federated method."""

    name: str = "fedit"  # as in edge_runtime.methods
    settings: dict[str, Any] = {}  # the table's other keys, which the method's file describes
    server_step: Factor = 1.0  # the version moves so many times the mean delta (aggregator/server_step.py)
    # The share of its last step that a version takes again.
    momentum: Annotated[float, Bound(lambda share: 0 <= share < 1, "0 or more, and below 1")] = 0.0


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear head over the labels; without it, rows of text and label are learned as text."""

    # who shares each label's row; the whole fleet does in the models' common frame (methods/frames.py)
    shared: Literal["fleet", "class", "private"] = "class"
    # rows that begin in closed form (trainer/head.py); None: all of a fleet's head, else unseen labels'
    start: Literal["unseen", "all", "zero"] | None = None


class Public(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Public texts, by which devices of different models come to understand each other."""

    file: PathText  # on the node, a .jsonl file (aggregator/opening.py)
    # in use: the file's first; 0: all that it has
    texts: Annotated[int, Bound(lambda texts: 0 <= texts <= 1 << 20, f"0 to {1 << 20}")] = 0
    # of the models' activations; rotated: at random, for comparison, with or without that of the head
    frame: Literal["common", "rotated", "rotated branches"] = "common"


class Codistill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices of all models learn from each other's predictions on the public texts.

    With a [head] a prediction is a label, without it a completion. rows and weight are those of the
    last round; they grow up to it, but for labels that a device has no rows of
    (methods/codistill.py).
    """

    rows: Positive = 16  # public texts in a step, beside the device's rows
    weight: Factor = 2.0  # of the public texts' mean loss, beside the mean loss of the device's rows
    # of label targets; below 1 they are surer
    temperature: Annotated[float, Bound(lambda value: 0.05 <= value <= 20, "0.05 to 20")] = 0.5
    tokens: int = 32  # of a completion with its end; longer completions do not count
    across: bool = True  # between models; false: among devices of one model, for comparison
    # of label predictions; "mean" is FedMD's, "oracle" the texts' true labels: controls of studies
    votes: Literal["weighted", "mean", "oracle"] = "weighted"


class Codec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How coarsely values are rounded; the sender adds the remainder to what it sends next."""

    # of a tensor's root mean square; None: the number of rounds decides (Method.codec_step)
    step: Annotated[float | None, Bound(lambda step: 0.01 <= step <= 4, "0.01 to 4")] = None


class Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The adapter on each linear layer of the roles: y = W x + (alpha / rank) B C A x."""

    rank: Annotated[int, Bound(lambda rank: 1 <= rank <= 256, "1 to 256")] = 16
    # Falling ranks for devices that `rank` does not fit; only for methods that merge unequal ranks
    # or exchange nothing.
    lower: tuple[int, ...] = ()
    alpha: Factor = 32.0
    roles: Annotated[tuple[Role, ...], Bound(len, "at least one role")] = get_args(Role)

    def at(self, rank: int) -> "Adapter":
        """The adapter at another rank; alpha / rank stays the fleet's."""
        return msgspec.structs.replace(self, rank=rank, alpha=self.alpha * rank / self.rank)


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A round of local training."""

    steps: Positive = 20  # optimiser steps a round
    rows_a_step: Positive = 16  # rows whose gradients make a step
    # The peak; it falls along a cosine to a tenth over all rounds.
    learning_rate: Annotated[float, Bound(lambda rate: 0 < rate < 1, "between 0 and 1")] = 1e-3
    warmup_steps: Count = 4  # steps in which the learning rate rises to the peak
    weight_decay: Annotated[float, Bound(lambda decay: 0 <= decay < 1, "0 or more, and below 1")] = 0.0
    clip_norm: Factor = 1.0
    max_tokens: Annotated[int, Bound(lambda value: value >= 8, "8 or more")] = 512  # longer rows are cut
    shorter: tuple[int, ...] = ()  # falling lengths for devices that max_tokens does not fit
    # Slices whose loss a step takes: the device's alone, or in turn also each smaller slice that
    # the catalog has of the checkpoint, so that the delta fits smaller devices too
    # (models/slices.py).
    slices: Literal["own", "nested"] = "nested"
    timeout_s: Annotated[float, SECONDS] = 3600.0
    # Predicted seconds that a step may take; None: no limit.
    step_deadline_s: Annotated[float | None, SECONDS] = None


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fleet as its node runs it."""

    name: TopicName
    catalog: tuple[Model, ...]
    rounds: Positive = 3
    quorum: Positive = 1  # updates that a round needs before it may close
    deadline_s: Annotated[float, SECONDS] = 600.0  # a round's wait for devices that are online
    extensions: Count = 3  # further deadlines for a round below quorum, before the node gives up
    seed: int = 0
    method: MethodChoice = MethodChoice()
    adapter: Adapter = Adapter()
    training: Training = Training()
    codec: Codec = Codec()
    head: Head | None = None
    public: Public | None = None
    codistill: Codistill | None = None


OF_EVERY_METHOD = tuple(name for name in MethodChoice.__struct_fields__ if name != "settings")
TABLES: dict[str, Any] = {
    table.__name__.lower(): table for table in (Adapter, Training, Codec, Head, Public, Codistill)
}


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
    if fleet.codistill is not None and fleet.codistill.votes == "oracle":
        raise InputError(
            f'{path}: [codistill] votes is "oracle", which needs the labels of the public texts, so it is for studies: '
            'a fleet takes "weighted" or "mean"'
        )
    if fleet.public is None:
        return fleet
    file = str(path.parent / fleet.public.file)
    return msgspec.structs.replace(fleet, public=msgspec.structs.replace(fleet.public, file=file))


def read_toml(path: Path, name: str, advice: str = "") -> dict[str, Any]:
    """The tables of a TOML file; raises InputError naming the file, and saying what to do."""
    try:
        return tomllib.loads(files.utf_8(path.read_bytes()).decode())
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}{advice}") from error
    except files.NotUtf8 as error:
        raise InputError(f"{path} {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error


def parse(tables: dict[str, Any]) -> Fleet:
    """Make a Fleet of a fleet file's tables; raises InputError naming key, value and need."""
    allowed = {"fleet", "catalog", "method", *TABLES}
    for name in ("fleet", "method", *TABLES):
        if not isinstance(tables.get(name, {}), dict):
            raise InputError(f"`{name}` is a table: write [{name}] on a line of its own and its keys below")
    refuse_unknown(tables, allowed, "")
    top = tables.get("fleet", {})
    refuse_unknown(top, set(Fleet.__struct_fields__) - allowed, "[fleet] ")
    for name, table in TABLES.items():
        refuse_unknown(tables.get(name, {}), set(table.__struct_fields__), f"[{name}] ")
    if not isinstance(tables.get("catalog", []), list):
        raise InputError(
            "`catalog` is a list of models: write [[catalog]] on a line of its own and the model's keys below"
        )
    for entry in tables.get("catalog", []):
        refuse_unknown(entry, set(Model.__struct_fields__), "[[catalog]] ")
    chosen = dict(tables.get("method", {}))
    method = {name: chosen.pop(name) for name in OF_EVERY_METHOD if name in chosen} | {"settings": chosen}
    fields = {name: table for name, table in tables.items() if name != "fleet"}
    try:
        fleet = msgspec.convert({**fields, **top, "method": method}, Fleet)
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


def _check(fleet: Fleet) -> None:
    """Raise InputError for the first value that is out of bounds."""
    adapter, training, codistill = fleet.adapter, fleet.training, fleet.codistill
    ranks, lengths = (adapter.rank, *adapter.lower), (training.max_tokens, *training.shorter)
    _require("[[catalog]]", len(fleet.catalog), bool(fleet.catalog), "at least one model")
    _check_fields(fleet, "[fleet]")
    _check_fields(fleet.method, "[method]")
    for name in TABLES:
        if (table := getattr(fleet, name)) is not None:
            _check_fields(table, f"[{name}]")
    for model in fleet.catalog:
        _check_fields(model, "[[catalog]]", f" of {model.source}")
    for key, needed, numbers, least in (
        ("[adapter] lower", "ranks that fall, from below rank", ranks, 1),
        ("[training] shorter", "lengths that fall, from below max_tokens", lengths, 8),
    ):
        falls = all(above > below >= least for above, below in pairwise(numbers))
        _require(key, numbers[1:], falls, f"{needed} ({numbers[0]}) to {least} or more")
    in_frame = fleet.head is not None and fleet.head.shared == "fleet"
    for table, is_there in (("[codistill]", codistill is not None), ('[head] shared = "fleet"', in_frame)):
        if is_there and fleet.public is None:
            raise InputError(f"{table} needs public texts: add [public] with their file")
    if codistill is not None and fleet.public is not None and fleet.head is None:
        # predictions are completions
        weighted = codistill.votes == "weighted"
        _require("[codistill] votes", codistill.votes, weighted, "weighted without a [head]")
        total, longest = fleet.public.texts * codistill.tokens, min(lengths) - 8
        _require("[public] texts x [codistill] tokens", total, total <= MOST_TOKENS, f"{MOST_TOKENS} or less")
        needed = f"2 to {longest}, as rows are cut to {min(lengths)}"
        _require("[codistill] tokens", codistill.tokens, 2 <= codistill.tokens <= longest, needed)


def _check_fields(table: msgspec.Struct, where: str, of: str = "") -> None:
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        for bound in getattr(field.type, "__metadata__", ()):
            _require(f"{where} {field.name}{of}", value, value is None or bound.holds(value), bound.needed)


def _require(key: str, value: Any, holds: bool, needed: str) -> None:
    if not holds:
        shown = repr(value) if isinstance(value, str) else value
        raise InputError(f"{key} is {shown}, but has to be {needed}")
