"""Merges a round's checked updates: each class, then across classes, one update at a time.

    master_r = master_{r-1} + step(merged(deltas))

What devices get of a master is the matter of publish.py.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from edge_broker.journal import Update
from safetensors import safe_open
from safetensors.numpy import load_file

from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator import publish, server_step
from edge_runtime.aggregator.publish import Merged, Publication
from edge_runtime.aggregator.store import Version
from edge_runtime.methods import frames
from edge_runtime.methods.interface import Array, Contribution, Entries, Method, Scope, Tensors
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import STATE, parse
from edge_runtime.protocol.round import FLEET
from edge_runtime.settings import Fleet


class _Before(NamedTuple):
    """What a round's deltas are added to."""

    versions: Mapping[str, Version]  # by model class
    fleet: Fleet
    method: Method


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
    before, written = _Before(versions, fleet, method), []
    joining: Tensors = {}
    to = Publication(fleet, method, round_, folder)
    # first the version that all classes share, and then each class's
    shared = _merge_scope("fleet", FLEET, updates, before)
    if method.framed:
        shared.state[frames.MADE], joining = _frame(updates, before, shared.state.get(frames.MADE))
    if shared.state or shared.answers or FLEET in versions:
        written.append(publish.write(FLEET, shared, {}, versions.get(FLEET), to))
    classes = {update.manifest.model_class for update in updates}
    scopes = {method.scope(kind) for kind in method.merges}
    if (
        "fleet" in scopes
        or method.framed
        or (method.answers is not None and method.answers.shared == "fleet")
    ):
        # a class without updates gets the shared tensors and answers, too
        classes |= versions.keys() - {FLEET}
    for model_class in sorted(classes):
        sent = [update for update in updates if update.manifest.model_class == model_class]
        merged = _merge_scope("class", model_class, sent, before)
        merged = merged._replace(answers=merged.answers or shared.answers)
        if model_class in joining:
            merged.state[frames.SENT] = joining[model_class]
        written.append(publish.write(model_class, merged, shared.state, versions.get(model_class), to))
    return written


def _merge_scope(scope: Scope, model_class: str, updates: list[Update], before: _Before) -> Merged:
    """What devices of a class, or of FLEET, share in this scope after the round."""
    last, method = before.versions.get(model_class), before.method
    state, momenta = ({}, {}) if last is None else (load_file(last.master), _momenta(last, before.fleet))
    # a class keeps the features that it joined with (_frame), whoever sends others
    for kind in method.merges:
        if kind != "frame" and method.scope(kind) == scope:
            _merge_kind(kind, updates, before, state, momenta)
    answers = b""
    if method.answers is not None and method.answers.shared == scope:
        # a device that sends features was asked nothing yet
        asked = [each for each in updates if frames.SENT not in codec.shapes(each.payload.read_bytes())]
        if asked:
            answers = method.answers.merge(partial(_answers, asked))
        elif last is not None:
            answers = codec.answers(last.artifact.read_bytes())
    return Merged(state, momenta, answers)


def _momenta(version: Version, fleet: Fleet) -> Tensors:
    return load_file(version.momenta) if fleet.method.momentum and version.momenta.exists() else {}


def _frame(updates: list[Update], before: _Before, frame: "Array | None") -> tuple[Array, Tensors]:
    """The common frame of all classes, and the features of each class that joins in this round.

    frame: the frame before, which stays where no class joins.
    """
    sent: dict[str, list[Update]] = {name: [] for name in before.versions if name != FLEET}
    for update in updates:
        sent.setdefault(update.manifest.model_class, []).append(update)
    features: list[Array] = []
    joining: Tensors = {}
    for model_class, of_class in sorted(sent.items()):
        X = _joined_with(before.versions.get(model_class))
        if X is None:
            central = before.method.merges["frame"](partial(_contributions, "frame", of_class, before, {}))
            X = central.get(frames.SENT)
            if X is not None:
                joining[model_class] = X
        if X is not None:
            features.append(X)
    return frames.common(features, frame) if joining or frame is None else frame, joining


def _joined_with(version: "Version | None") -> "Array | None":
    """The features in the class's version; None: the class has not joined the frame."""
    if version is None:
        return None
    with safe_open(version.master, framework="np") as master:
        return master.get_tensor(frames.SENT) if frames.SENT in set(master.keys()) else None


def _answers(updates: list[Update]) -> Iterator[tuple[int, bytes]]:
    """The rows and answers of each device."""
    for update in updates:
        yield update.manifest.samples, codec.answers(update.payload.read_bytes())


def _merge_kind(kind: str, updates: list[Update], before: _Before, state: Tensors, momenta: Tensors) -> None:
    """Take the step of one kind of tensors, in place."""
    old = dict(state)  # with the version 0 of keys that the state has not yet
    steps = before.method.merges[kind](partial(_contributions, kind, updates, before, old))
    # a version has no mean of peers but the round's own
    gone = {key: -old[key] for key in old if parse(key).kind == kind == "peers" and key not in steps}
    # values have no version 0: their first step is their value
    for key, step in (steps | gone).items():
        # a label's first row is the devices' start and what they learned from there, not a step alone;
        # nor is a row K, which devices make anew each round
        if kind in STATE and (kind != "labels" or (key in state and parse(key).factor != "K")):
            step = server_step.step(key, step, before.fleet.method, momenta)
        state[key] = old[key] + step if key in old else step


def _contributions(kind: str, updates: list[Update], before: _Before, old: Tensors) -> Iterator[Contribution]:
    """One kind of tensors, update by update. Puts missing starts into `old`."""
    _, fleet, method = before

    @cache
    def start(model_class: str) -> Tensors:
        """This kind as devices of a class start from it: as it was published, not the master."""
        version = before.versions.get(model_class, before.versions.get(FLEET))
        chain = version.chain if version is not None else ()
        return published(chain, fleet.seed, method, lambda key: parse(key).kind == kind)

    for update in updates:
        payload, model_class = update.payload.read_bytes(), update.manifest.model_class
        delta = codec.decode(payload, lambda key: parse(key).kind == kind)
        share = codec.rank(payload) / fleet.adapter.rank
        parts: dict[str, Entries] = {}
        for key, value in delta.items():
            if key not in old and kind in STATE:
                old[key] = version_0(key, value.shape, fleet, method)
            if share and (chosen := method.factor(key).chosen) is not None:
                version = start(model_class)
                if key not in version:
                    version[key] = version_0(key, value.shape, fleet, method)
                parts[key] = chosen(version[key], share)
        if delta:
            yield Contribution(old, delta, update.manifest.samples, model_class, parts)


def version_0(key: str, shape: tuple[int, ...], fleet: Fleet, method: Method) -> Array:
    """The start of a factor in the fleet's full rank, from its shape in any rank."""
    factor = method.factor(key)
    sizes = dict(zip(factor.axes, shape, strict=True))
    full = factor.shape({**sizes, **method.sizes(fleet.adapter.rank), "rank": fleet.adapter.rank})
    return initial(key, full, fleet.seed, factor)
