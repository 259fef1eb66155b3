"""Writes the versions of a round: each class's master, and the artifact that devices lack.

    artifact_r = encode(master_r - P_{r-1})       P: what devices start from (adapters/versions.py)

The master is float32. What rounding loses of a version is part of the next difference, so it does
not add up over rounds. A chain of LONGEST_CHAIN artifacts is followed by a new chain, whose first
artifact is the whole master in a fine step. So a device that comes late fetches LONGEST_CHAIN files
at most, two and a half times a whole state; and one that stays fetches 2.3 bits a value a round in
the mean, where differences take 1.6 and whole states 7.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from edge_broker import files
from safetensors import SafetensorError
from safetensors.numpy import save_file

from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator.store import Version
from edge_runtime.methods import frames
from edge_runtime.methods.interface import Method, Tensors
from edge_runtime.protocol import codec
from edge_runtime.protocol.round import FLEET
from edge_runtime.settings import FINE_STEP, Fleet

LONGEST_CHAIN = 8  # artifacts


class Merged(NamedTuple):
    """What devices of a scope share after a round."""

    state: Tensors
    momenta: Tensors  # of server_step.py; empty without momentum
    answers: bytes


class Publication(NamedTuple):
    """For whom the versions of a round are written, and where."""

    fleet: Fleet
    method: Method
    round: int
    folder: Path


def write(
    model_class: str, merged: Merged, shared: Tensors, last: Version | None, to: Publication
) -> Version:
    """Write a class's master, and its artifact, which also holds the tensors that all share.

    last: the class's version before the round.
    """
    chain = chain_before(last)
    name = f"{to.round:05d}-{hashlib.sha256(model_class.encode()).hexdigest()[:12]}"
    version = Version(model_class, to.folder / f"{name}.safetensors", (*chain, to.folder / f"{name}.edc"))
    _save(merged.state, version.master)
    if merged.momenta:
        _save(merged.momenta, version.momenta)
    # features stay on the node; a class that is not in the frame starts from the fleet's version, without it
    apart = (frames.SENT, frames.MADE) if model_class == FLEET else (frames.SENT,)
    whole = {key: value for key, value in {**merged.state, **shared}.items() if key not in apart}
    part = version.artifact.with_suffix(".part")
    part.write_bytes(_artifact(whole, merged.answers, chain, to))
    files.put(part, version.artifact)
    return version


def chain_before(last: Version | None) -> tuple[Path, ...]:
    """The chain that the version after `last` adds to; empty where it begins one."""
    return last.chain if last is not None and len(last.chain) < LONGEST_CHAIN else ()


def _artifact(whole: Tensors, answers: bytes, chain: tuple[Path, ...], to: Publication) -> bytes:
    """What devices that have the chain lack, encoded."""
    step = to.method.codec_step(to.fleet)
    if not chain and to.round > 1:  # a whole state, of which the next differences should not mend much
        step = min(step, FINE_STEP)
    differences = published(chain, to.fleet.seed, to.method)
    for key, value in whole.items():
        if key not in differences:
            differences[key] = initial(key, value.shape, to.fleet.seed, to.method.factor(key))
        np.subtract(value, differences[key], out=differences[key])
    return codec.encode(differences, answers, step)


def _save(tensors: Tensors, path: Path) -> None:
    part = path.with_suffix(".part")
    try:
        save_file(tensors, part)
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"{part}: {error}") from error
    files.put(part, path)
