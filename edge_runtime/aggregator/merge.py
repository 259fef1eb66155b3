"""Checks a delta, and merges a round: class by class, then across them, one update in memory at a time.

    master_r = master_{r-1} + merged(deltas)        published: encode(master_r), which devices decode and start from

The master stays in float32, so rounding what is published does not add up over rounds.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from edge_broker import files
from edge_broker.journal import Update
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_runtime.adapters.initial import initial
from edge_runtime.aggregator.store import Version
from edge_runtime.errors import InputError
from edge_runtime.methods import completions
from edge_runtime.methods.interface import WIDTHS, Contribution, Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.completion import Completion
from edge_runtime.protocol.keys import LABEL, kind_of, name_of
from edge_runtime.protocol.round import FLEET
from edge_runtime.settings import Fleet

KEY = re.compile(
    r"(layers\.(0|[1-9][0-9]{0,3})|stages\.(?P<stage>0|[1-9][0-9]{0,3}))\.(?P<role>[a-z0-9_]+)\.[A-Za-z]+"
    rf"|(labels|anchors)\.{LABEL.pattern}\.[A-Z]"
)
STATE = (
    "layers",
    "stages",
    "labels",
)  # what has a start and is added to; the rest takes the place of what was there
WIDEST = 1 << 20  # rows or columns of a factor
LARGEST_ADAPTER = 1 << 28  # values
MOST_LABELS = 1 << 14
LARGEST_TOTAL = 1.05  # of a device's probabilities, after rounding to 8 bits
CHARACTERS_A_TOKEN = 32  # of a completion, at most
LARGEST_NORM = 1e4  # of one factor's delta; a trained one has a few units


def check(
    payload: bytes, known: Mapping[str, tuple[int, ...]], fleet: Fleet, method: Method
) -> codec.Tensors:
    """Decode a device's delta if nothing is wrong with it.

    Args:
        known: keys and shapes that other devices of the class have sent.

    Raises:
        InputError: a key, a shape or a value that does not fit the fleet's adapter; it is named.
    """
    _check_shapes(codec.shapes(payload), known, fleet, method)
    delta = codec.decode(payload)
    _check_predictions(delta)
    _check_completions(codec.completions(payload), fleet, method)
    for key, value in delta.items():
        norm = float(np.linalg.norm(value))
        if norm > LARGEST_NORM:
            raise InputError(
                f"{key} changed by a norm of {norm:.3g}, more than {LARGEST_NORM:g}: the training diverged"
            )
    return delta


def _check_predictions(delta: codec.Tensors) -> None:
    """Refuse what is no probabilities: of each public text they are in 0 to 1, and add up to at most 1."""
    said = {key: value for key, value in delta.items() if kind_of(key) == "anchors"}
    total = np.zeros(1, np.float32)
    for key, value in said.items():
        total = total + value
        if float(value.min()) < 0 or float(total.max()) > LARGEST_TOTAL:
            raise InputError(
                f"{key} is no probabilities: they have to be 0 or more, and to add up to 1 at most"
            )


def _check_completions(said: list[Completion], fleet: Fleet, method: Method) -> None:
    """Refuse what completes no prompt of this fleet, or one twice."""
    if said and method.completions is None:
        raise InputError("the delta holds completions, which this fleet does not exchange")
    if fleet.codistill is None:
        return
    met: set[int] = set()
    most = CHARACTERS_A_TOKEN * fleet.codistill.tokens
    for one in said:
        if not 0 <= one.prompt < fleet.codistill.texts or one.prompt in met:
            raise InputError(
                f"the delta completes prompt {one.prompt}, which it has completed or this fleet does not have"
            )
        if not one.text.strip() or len(one.text) > most:
            raise InputError(
                f"the completion of prompt {one.prompt} has {len(one.text)} characters, but has to have 1 to {most}"
            )
        if not 0 <= one.confidence <= 1:
            raise InputError(
                f"the confidence in the completion of prompt {one.prompt} is {one.confidence}, not 0 to 1"
            )
        met.add(one.prompt)


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]], fleet: Fleet, method: Method
) -> None:
    """Refuse what is no adapter of this fleet; the node holds no model, so what a class's first device sent is the measure."""
    allowed, ranks = (fleet.adapter.rank, *fleet.adapter.lower), set()
    if method.pruned is not None:
        allowed = tuple(range(fleet.adapter.rank, 0, -1))
    known = {**_heads(shapes), **_heads(known), **known}
    if not shapes and fleet.codistill is None:  # who has nothing to say of public texts says so
        raise InputError("the delta holds no factor")
    for key, shape in shapes.items():
        if not _exchanged(key, fleet, method):
            raise InputError(f"the delta holds {key[:80]}, which this fleet's adapter does not exchange")
        axes = method.factor(key).axes
        sizes = dict(zip(axes, shape, strict=False))
        like = known.get(key, known.get(kind_of(key), shape))
        widths = dict(zip(axes, like, strict=False))
        rank = sizes.get("rank", allowed[0])
        full = {
            **method.sizes(rank),
            "one": 1,
            "rank": rank,
            **{axis: widths.get(axis, 0) for axis in WIDTHS},
        }
        fits = len(shape) == len(axes) and rank in allowed and shape == method.factor(key).shape(full)
        if not fits or any(not 1 <= sizes[axis] <= WIDEST for axis in axes):
            one_of = " or ".join(map(str, allowed)) if method.pruned is None else f"{allowed[0]} or lower"
            of = f"of rank {one_of}" if "rank" in axes else "as the fleet has it"
            needed = [f"for a layer {widths[axis]} wide" for axis in axes if axis in WIDTHS and key in known]
            raise InputError(f"{key} is {shape} in the delta, but has to be {', '.join([of, *needed])}")
        ranks |= {rank} if "rank" in axes else set()
    if len(ranks) > 1:
        raise InputError(f"the delta has factors of ranks {sorted(ranks)}, but one device has one")
    whole = max(fleet.adapter.rank, method.sizes(fleet.adapter.rank).get("kept", 0))
    full_rank = -(-whole // min(ranks, default=whole))  # a merge has them in that rank
    if full_rank * sum(map(math.prod, shapes.values())) > LARGEST_ADAPTER:
        raise InputError(f"the delta has more than {LARGEST_ADAPTER} values")


def _heads(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape that every label's row has, by its kind, as the first one has it."""
    rows = [shape for key, shape in shapes.items() if kind_of(key) == "labels"]
    if len(rows) > MOST_LABELS:
        raise InputError(f"the delta has {len(rows)} labels, but a head has at most {MOST_LABELS}")
    return {"labels": rows[0]} if rows else {}


def _exchanged(key: str, fleet: Fleet, method: Method) -> bool:
    """Whether a key is one that devices of this fleet send."""
    parts = KEY.fullmatch(key)
    name = name_of(key)
    if not parts or name not in method.factors or not method.exchanged(key):
        return False
    role = parts["role"]
    if parts["stage"] is not None and int(parts["stage"]) >= method.sizes(fleet.adapter.rank).get(
        "stages", 1
    ):
        return False
    return method.factors[name].of == kind_of(key) and (role is None or role in fleet.adapter.roles)


def merge(
    updates: list[Update],
    versions: Mapping[str, Version],
    fleet: Fleet,
    method: Method,
    round_: int,
    folder: Path,
) -> list[Version]:
    """The global version of every class after a round, and what the fleet shares across them.

    Args:
        updates: the committed ones of the round; their content was checked before.
        versions: before the round.
        folder: where the new versions are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    across = {kind for kind in method.merges if method.scope(kind) == "fleet"}
    shared = load_file(versions[FLEET].master) if FLEET in versions else {}
    for kind in across:
        _merge_kind(method, kind, updates, shared, fleet)
    agreed = completions.agreed(partial(_completions, updates)) if method.completions == "fleet" else []
    own = {update.manifest.model_class for update in updates}
    crosses = bool(across) or method.completions == "fleet"
    written = (
        [_write(FLEET, shared, {}, agreed, round_, folder)] if shared or agreed or FLEET in versions else []
    )
    for of in sorted(
        own | (versions.keys() - {FLEET} if crosses else set())
    ):  # who is not there gets what is shared, too
        state = load_file(versions[of].master) if of in versions else {}
        mine = [update for update in updates if update.manifest.model_class == of]
        for kind in method.merges.keys() - across:
            _merge_kind(method, kind, mine, state, fleet)
        if method.completions == "class":
            kept = [] if mine else codec.completions(versions[of].artifact.read_bytes())
            agreed = completions.agreed(partial(_completions, mine)) or kept
        written.append(_write(of, state, shared, agreed, round_, folder))
    return written


def _completions(updates: list[Update]) -> Iterator[tuple[int, list[Completion]]]:
    """What the devices of each update say of the public prompts, one update after another."""
    for update in updates:
        yield update.manifest.samples, codec.completions(update.payload.read_bytes())


def _merge_kind(
    method: Method, kind: str, updates: list[Update], state: dict[str, NDArray[np.float32]], fleet: Fleet
) -> None:
    """Take the step of one kind of tensors, in place."""
    for key, step in method.merges[kind](
        partial(_contributions, kind, updates, state, fleet, method)
    ).items():
        state[key] = state[key] + step if key in state else step
    for key in [key for key in state if method.factor(key).anew]:
        del state[key]


def _contributions(
    kind: str, updates: list[Update], before: dict[str, NDArray[np.float32]], fleet: Fleet, method: Method
) -> Iterator[Contribution]:
    """The updates one after another, of each this kind of tensors; what no version has yet is put into `before` when it is
    first met."""
    for update in updates:
        delta = codec.decode(update.payload.read_bytes(), lambda key: kind_of(key) == kind)
        for key, value in delta.items():
            if key not in before and method.factor(key).of in STATE:
                before[key] = version_0(key, value.shape, fleet, method)
        if delta:
            yield Contribution(before, delta, update.manifest.samples, update.manifest.model_class)


def version_0(key: str, shape: tuple[int, ...], fleet: Fleet, method: Method) -> NDArray[np.float32]:
    """What a factor starts from, in the fleet's full rank, whichever the device has."""
    factor = method.factor(key)
    sizes = dict(zip(factor.axes, shape, strict=True))
    full = factor.shape({**sizes, **method.sizes(fleet.adapter.rank), "rank": fleet.adapter.rank})
    return initial(key, full, fleet.seed, factor)


def _write(
    of: str,
    state: dict[str, NDArray[np.float32]],
    shared: dict[str, NDArray[np.float32]],
    agreed: list[Completion],
    round_: int,
    folder: Path,
) -> Version:
    """A class's master, and the artifact in which its devices also get what is shared and agreed."""
    name = f"{round_:05d}-{hashlib.sha256(of.encode()).hexdigest()[:12]}"
    version = Version(of, folder / f"{name}.safetensors", folder / f"{name}.edc")
    for path in (version.master, version.artifact):
        part = path.with_suffix(".part")
        if path is version.master:
            try:
                save_file(state, part)
            except SafetensorError as error:  # a full disk, most likely
                raise OSError(f"{part}: {error}") from error
        else:
            part.write_bytes(codec.encode({**state, **shared}, agreed))
        files.put(part, path)
    return version
