"""A node that starts on earlier state: it refuses other settings and ends interrupted work."""

import hashlib
from pathlib import Path

import msgspec
from edge_broker.journal import Journal
from edge_broker.transfer import Receiver

from edge_runtime.aggregator.store import NodeStore
from edge_runtime.errors import InputError
from edge_runtime.settings import Fleet
from edge_runtime.trainer import data

KEPT_ROUNDS = 10  # rounds whose versions stay in the state folder


def check_settings(
    fleet: Fleet, texts: list[data.Row], store: NodeStore, journal: Journal, folder: Path
) -> None:
    """Keep the settings that later rounds build on, or compare them once an update has come in.

    Raises:
        InputError: versions and updates in the folder were made with other settings; the first of
            these is named.
    """
    public = fleet.codistill
    fixed = {
        "[method]": fleet.method,
        "[adapter]": msgspec.structs.replace(fleet.adapter, lower=()),
        "[head]": fleet.head,
        "[codistill] texts and across": (public.texts, public.across) if public is not None else None,
        # devices refer to the texts by number
        "[codistill] anchors": hashlib.sha256(msgspec.json.encode(texts)).hexdigest()[:12],
        "[fleet] seed": fleet.seed,
    }
    values = {name: msgspec.json.encode(value).decode() for name, value in fixed.items()}
    before = store.fixed()
    if store.open_round() == 1 and not journal.committed(1):
        store.fix(values)
    elif changed := [name for name, value in values.items() if before.get(name, value) != value]:
        raise InputError(
            f"{folder} was made with another {', '.join(changed)}: `{before[changed[0]]}`, now "
            f"`{values[changed[0]]}`; put that back into the fleet file, or start anew with another --state"
        )


def end_earlier_rounds(round_: int, store: NodeStore, journal: Journal, receiver: Receiver) -> None:
    """Refuse incomplete transfers of earlier rounds; delete payloads and versions without use."""
    for manifest in journal.open_transfers():
        if manifest.round < round_:
            reason = f"round {manifest.round} was closed before it was complete"
            receiver.reject(manifest.transfer, reason, "late")
    journal.release(round_ - 1)
    store.forget_versions(round_ - KEPT_ROUNDS)
