"""Before a round opens: the broker, public texts, settings that may not change, remains of earlier rounds."""

import hashlib
import logging
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import msgspec
from edge_broker.address import Address
from edge_broker.errors import BrokerError
from edge_broker.journal import Journal
from edge_broker.session import Session
from edge_broker.transfer import Receiver

from edge_runtime.aggregator.store import NodeStore, Version
from edge_runtime.errors import InputError, UnreachableError
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import label_of, parse
from edge_runtime.settings import Fleet
from edge_runtime.trainer import data

log = logging.getLogger(__name__)

CONNECT_S = 15.0
KEPT_ROUNDS = 10  # rounds whose versions stay in the state folder
TEXTS_A_LABEL = 10  # about; the studies have as many


def check_broker(fleet: Fleet, broker: Address) -> None:
    """Raise InputError for a closed fleet on a broker whose devices show no certificates."""
    if fleet.open or (broker.scheme == "mqtts" and "cert" in broker.files):
        return
    raise InputError(
        f"fleet `{fleet.name}` is closed, and {broker} is without client certificates, so anyone who reaches it could join: "
        "set up TLS as broker/README.md says, or let anyone join with `open = true` below [fleet]"
    )


def connect(session: Session) -> None:
    """Connect a node's session; raises UnreachableError without a broker."""
    try:
        session.connect(CONNECT_S)
    except BrokerError as error:
        raise UnreachableError(str(error)) from error


def public_texts(fleet: Fleet) -> list[data.Row]:
    """The question of each of the file's first `texts` usable rows; none without [public].

    Raises:
        InputError: the fleet's file cannot be read, or has too few rows that can be used.
    """
    if fleet.public is None:
        return []
    spec, headed = fleet.public, fleet.head is not None  # a head classifies texts, not messages
    questions = map(_question, data.stream(Path(spec.file)))
    usable = (row for row in questions if row.get("text", "").strip() or ("messages" in row and not headed))
    texts = list(islice(usable, spec.texts or None))
    if len(texts) < max(spec.texts, 1):
        needed = "a text or a prompt" if headed else "a text, a prompt or messages"
        raise InputError(
            f"[public] texts is {spec.texts or 'all'}, but {spec.file} has {len(texts)} rows with {needed}: lower it, or "
            "add rows"
        )
    return texts


def _question(row: data.Row) -> data.Row:
    """A row's text or prompt, or its messages before the assistant's last message."""
    if "messages" not in row:
        return {"text": row.get("text", row.get("prompt"))}
    messages = row["messages"]
    last = max(number for number, turn in enumerate(messages) if turn["role"] == "assistant")
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages[:last]]}


def texts_suffice(fleet: Fleet, versions: Iterable[Version]) -> bool:
    """Whether the labels of these versions have enough public texts; a warning says so if not."""
    if fleet.head is None or fleet.codistill is None or fleet.public is None:
        return True
    keys = chain.from_iterable(codec.shapes(version.artifact.read_bytes()) for version in versions)
    labels = len({label_of(key) for key in keys if parse(key).kind in ("labels", "anchors")})
    if few := labels * TEXTS_A_LABEL > fleet.public.texts:
        log.warning(
            "the fleet has %d labels and %d public texts: with fewer than about %d texts a label, devices learn little of "
            "labels that they have no rows of; give [public] %d texts or more",
            labels,
            fleet.public.texts,
            TEXTS_A_LABEL,
            labels * TEXTS_A_LABEL,
        )
    return not few


def check_settings(
    fleet: Fleet, texts: list[data.Row], store: NodeStore, journal: Journal, folder: Path
) -> None:
    """Store the settings that later rounds build on; once an update has come in, compare them.

    Raises:
        InputError: versions and updates in the folder were made with other settings; the first of
            these is named.
    """
    distils, head = fleet.codistill, fleet.head
    # a later round may take another server step, and rows that are new in it another start
    fixed = {
        "[method]": {"name": fleet.method.name, "settings": fleet.method.settings},
        "[adapter]": msgspec.structs.replace(fleet.adapter, lower=()),
        "[head]": None if head is None else msgspec.structs.replace(head, start=None),
        "[codistill] across": distils.across if distils is not None else None,
        # devices refer to the texts by number
        "[public] texts": hashlib.sha256(msgspec.json.encode(texts)).hexdigest()[:12],
        # devices go on with the maps into the frame that they have made
        "[public] frame": fleet.public.frame if fleet.public is not None else None,
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
