"""fleet.toml, typed: what a fleet trains, how, and for how many rounds.

    [fleet]     name, open, rounds, quorum, deadline_s, seed
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
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
from edge_broker import files

from edge_runtime.errors import InputError
from edge_runtime.settings.bounds import SECONDS, Count, Positive, TopicName, check_fields, require
from edge_runtime.settings.tables import (
    FINE_STEP,
    MOST_TOKENS,
    PACKED,
    Adapter,
    Backend,
    Boundaries,
    Codec,
    Codistill,
    Head,
    MethodChoice,
    Model,
    Public,
    Role,
    Training,
    Weights,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# importers take the tables from here
__all__ = ["FINE_STEP", "MOST_TOKENS", "PACKED", "Adapter", "Backend", "Boundaries", "Codec", "Codistill"]
__all__ += ["Head", "MethodChoice", "Model", "Public", "Role", "Training", "Weights"]
__all__ += ["Fleet", "load", "parse", "read_toml", "refuse_unknown"]


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fleet as its node runs it."""

    name: TopicName
    catalog: tuple[Model, ...]
    open: bool = False  # over any broker; False: only over TLS with client certificates
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
    require("[[catalog]]", len(fleet.catalog), bool(fleet.catalog), "at least one model")
    check_fields(fleet, "[fleet]")
    check_fields(fleet.method, "[method]")
    for name in TABLES:
        if (table := getattr(fleet, name)) is not None:
            check_fields(table, f"[{name}]")
    for model in fleet.catalog:
        check_fields(model, "[[catalog]]", f" of {model.source}")
    for key, needed, numbers, least in (
        ("[adapter] lower", "ranks that fall, from below rank", ranks, 1),
        ("[training] shorter", "lengths that fall, from below max_tokens", lengths, 8),
    ):
        falls = all(above > below >= least for above, below in pairwise(numbers))
        require(key, numbers[1:], falls, f"{needed} ({numbers[0]}) to {least} or more")
    in_frame = fleet.head is not None and fleet.head.shared == "fleet"
    for table, is_there in (("[codistill]", codistill is not None), ('[head] shared = "fleet"', in_frame)):
        if is_there and fleet.public is None:
            raise InputError(f"{table} needs public texts: add [public] with their file")
    if codistill is not None and fleet.public is not None and fleet.head is None:
        # predictions are completions
        weighted = codistill.votes == "weighted"
        require("[codistill] votes", codistill.votes, weighted, "weighted without a [head]")
        total, longest = fleet.public.texts * codistill.tokens, min(lengths) - 8
        require("[public] texts x [codistill] tokens", total, total <= MOST_TOKENS, f"{MOST_TOKENS} or less")
        needed = f"2 to {longest}, as rows are cut to {min(lengths)}"
        require("[codistill] tokens", codistill.tokens, 2 <= codistill.tokens <= longest, needed)
