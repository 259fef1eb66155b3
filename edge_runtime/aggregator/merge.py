"""Merges a round's checked updates: each class, then across classes, one update at a time.

    master_r = master_{r-1} + merged(deltas)
    published: encode(master_r), which devices decode and start from

The master is float32, so the rounding of the published version does not add up over rounds.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from edge_broker import files
from edge_broker.journal import Update
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_runtime.adapters.initial import initial
from edge_runtime.aggregator.store import Version
from edge_runtime.methods.interface import Array, Contribution, Method, Tensors
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import STATE, parse
from edge_runtime.protocol.round import FLEET
from edge_runtime.settings import Fleet


def merge(
    updates: list[Update],
    versions: Mapping[str, Version],
    fleet: Fleet,
    method: Method,
    round_: int,
    folder: Path,
) -> list[Version]:
    """The versions of all classes after a round, and one of the factors that cross classes.

    Args:
        updates: the committed updates of the round; `check` has accepted them.
        versions: by model class, before the round.
        folder: the new versions' files are written here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_class: dict[str, list[Update]] = {FLEET: updates}
    scopes = {method.scope(kind) for kind in method.merges}
    scopes |= {method.answers.shared} if method.answers is not None else set()
    # a class without updates gets the shared tensors and answers, too
    absent = versions.keys() - {FLEET} if "fleet" in scopes else set()
    for model_class in sorted({update.manifest.model_class for update in updates} | absent):
        by_class[model_class] = [update for update in updates if update.manifest.model_class == model_class]
    shared: Tensors = {}
    shared_answers = b""
    written = []
    # first the version that all classes share, and then each class's
    for model_class, sent in by_class.items():
        scope = "fleet" if model_class == FLEET else "class"
        state = load_file(versions[model_class].master) if model_class in versions else {}
        for kind in method.merges:
            if method.scope(kind) == scope:
                _merge_kind(kind, sent, state, fleet, method)
        answers = shared_answers
        if method.answers is not None and method.answers.shared == scope:
            if sent:
                answers = method.answers.merge(partial(_answers, sent))
            else:
                answers = codec.answers(versions[model_class].artifact.read_bytes())
        if scope == "fleet":
            shared, shared_answers = state, answers
        if scope == "class" or state or answers or FLEET in versions:
            written.append(_write(model_class, state, shared, answers, round_, folder))
    return written


def _answers(updates: list[Update]) -> Iterator[tuple[int, bytes]]:
    """The rows and answers of each device."""
    for update in updates:
        yield update.manifest.samples, codec.answers(update.payload.read_bytes())


def _merge_kind(kind: str, updates: list[Update], state: Tensors, fleet: Fleet, method: Method) -> None:
    """Take the step of one kind of tensors, in place."""
    before = dict(state)  # with the version 0 of keys that the state has not yet
    steps = method.merges[kind](partial(_contributions, kind, updates, before, fleet, method))
    # predictions have no version 0: their first step is their value
    for key, step in steps.items():
        state[key] = before[key] + step if key in before else step


def _contributions(
    kind: str, updates: list[Update], before: Tensors, fleet: Fleet, method: Method
) -> Iterator[Contribution]:
    """One kind of tensors, update by update. Puts missing starts into `before`."""
    for update in updates:
        delta = codec.decode(update.payload.read_bytes(), lambda key: parse(key).kind == kind)
        for key, value in delta.items():
            if key not in before and kind in STATE:
                before[key] = version_0(key, value.shape, fleet, method)
        if delta:
            yield Contribution(before, delta, update.manifest.samples, update.manifest.model_class)


def version_0(key: str, shape: tuple[int, ...], fleet: Fleet, method: Method) -> Array:
    """The start of a factor in the fleet's full rank, from its shape in any rank."""
    factor = method.factor(key)
    sizes = dict(zip(factor.axes, shape, strict=True))
    full = factor.shape({**sizes, **method.sizes(fleet.adapter.rank), "rank": fleet.adapter.rank})
    return initial(key, full, fleet.seed, factor)


def _write(
    model_class: str, state: Tensors, shared: Tensors, answers: bytes, round_: int, folder: Path
) -> Version:
    """Write a class's master, and its artifact, which also holds the tensors that all share."""
    name = f"{round_:05d}-{hashlib.sha256(model_class.encode()).hexdigest()[:12]}"
    version = Version(model_class, folder / f"{name}.safetensors", folder / f"{name}.edc")
    part = version.master.with_suffix(".part")
    try:
        save_file(state, part)
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"{part}: {error}") from error
    files.put(part, version.master)
    part = version.artifact.with_suffix(".part")
    part.write_bytes(codec.encode({**state, **shared}, answers))
    files.put(part, version.artifact)
    return version
