"""What may stand in a report: numbers, fixed words, and the texts listed here with their reason."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import msgspec.inspect as inspect
import pytest
import results
from edge_broker import address, messages, signing, topics
from edge_broker.session import Message

from benchmarks import noise
from edge_runtime.agent.deliveries import Deliveries
from edge_runtime.agent.local_round import DeviceRows, LocalRounds, Start, read_result
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.stages import RoundInProgress
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.report import REPORT_DOMAIN, Report, Score, without_names
from edge_runtime.protocol.round import Round
from edge_runtime.settings import Fleet, Model
from edge_runtime.trainer.job import Machine

TEXTS = {
    "Report.device": "the id the device joined with, which is part of each topic",
    "Report.node_key": "had from the node",
    "Report.process": "random",
    "Plan.source": "had from the node: the catalog's source",
    "Plan.model_class": "the source's last part and a digest of the weights",
    "Plan.terms": "names of the planner's terms",
    "Result.evaluation": "numbered by `without_names` before a report leaves",
    "Score.hits": "left out by `without_names`",
    "Result.phases": "names of the trainer's phases",
    "Result.seconds": "names of the trainer's phases",
}


def texts_in(kind: Any, name: str = "") -> set[str]:
    """Struct and field of every free text that a type can hold."""
    if isinstance(kind, inspect.StrType | inspect.AnyType | inspect.RawType | inspect.BytesType):
        return {name}
    if isinstance(kind, inspect.StructType):
        return {
            text
            for field in kind.fields
            for text in texts_in(field.type, f"{kind.cls.__name__}.{field.name}")
        }
    inner = [getattr(kind, part) for part in ("key_type", "value_type", "item_type") if hasattr(kind, part)]
    inner += [*getattr(kind, "types", ()), *getattr(kind, "item_types", ())]
    return {text for part in inner for text in texts_in(part, name)}


def test_a_report_holds_no_free_text_without_a_reason() -> None:
    assert texts_in(inspect.type_info(Report)) == TEXTS.keys()


def test_a_sentence_in_a_report_would_be_seen() -> None:
    """Twin: a field of text, and a list of texts deep inside."""

    class Inner(msgspec.Struct):
        lines: dict[int, list[str | None]]

    class Outer(msgspec.Struct):
        reason: str
        inner: tuple[Inner, ...]

    assert texts_in(inspect.type_info(Outer)) == {"Outer.reason", "Inner.lines"}


def test_a_cause_that_is_not_in_the_list_is_refused() -> None:
    report = {"device": "a", "node_key": "", "round": 1, "state": "failed", "budget_bytes": 0}
    assert msgspec.convert({**report, "cause": "disk"}, Report).cause == "disk"
    with pytest.raises(msgspec.ValidationError, match="cause"):
        msgspec.convert({**report, "cause": "line 3: a private row"}, Report)


def test_names_of_held_out_files_become_numbers_in_their_order() -> None:
    scores = {"clinic": Score(1.0, 0.0, 1), "street": Score(2.0, 0.5, 2)}
    hits = {name: msgspec.structs.replace(score, hits=b"\x80") for name, score in scores.items()}
    numbered = without_names(results.result(hits))
    assert numbered.evaluation == {"held_out_1": scores["clinic"], "held_out_2": scores["street"]}
    assert without_names(numbered) == numbered
    assert b"hits" not in msgspec.json.encode(numbered) and b"hits" in msgspec.json.encode(hits)


class Link:
    """A session that is never connected, and keeps what is published."""

    chunk_bytes, process = 1024, "p"
    traffic = NamedTuple("Traffic", [("bytes_up", int), ("bytes_down", int)])(0, 0)

    def __init__(self) -> None:
        self.published: list[Report] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        body, _ = signing.open(payload, REPORT_DOMAIN, None)
        self.published.append(msgspec.json.decode(body, type=Report))


def deliveries_of(folder: Path) -> tuple[Deliveries, Link, LocalRounds, DeviceStore]:
    store, link = DeviceStore(folder / "agent.db"), Link()
    options = DeviceOptions(
        broker=address.parse("mqtt://127.0.0.1:1"),
        fleet="f",
        id="a",
        data=folder,
        state=folder,
        budget_bytes=1,
        evaluation={},
        models=folder,
        threads=1,
        device="cpu",
        gpu_cap_bytes=None,
        wait_s=1.0,
        until_finished=False,
    )
    key = signing.load_or_create_key(folder / "device.key")
    local = LocalRounds(folder / "work", store, DeviceRows(folder, {}), Machine())
    return Deliveries(link, store, options, key, local), link, local, store  # type: ignore[arg-type]


@pytest.mark.parametrize("finished", [False, True])
def test_that_an_update_was_refused_is_kept_until_it_is_said(tmp_path: Path, finished: bool) -> None:
    """A kill may come right after the refusal. After the last round no node waits for it."""
    deliveries, link, local, store = deliveries_of(tmp_path)
    fleet = Fleet("f", (Model("m"),), rounds=1)
    announced = Round(node="n", fleet=fleet, round=1, state="open", versions={})
    deliveries.begin(RoundInProgress(announced, "key", attempt=1))
    job = local.job(1, fleet, noise.FACTS, noise.PLAN, Start())
    noise.workers("a", 5).train(job, local.folder(job), lambda event: None)
    result = read_result(local.folder(job))
    assert result is not None and deliveries.keep(job, result)
    deliveries.publish_owed()
    assert link.published == []  # the node has not taken the update yet
    if finished:
        deliveries.begin(RoundInProgress(msgspec.structs.replace(announced, state="finished"), "key"))
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as database:
        ((transfer,),) = database.execute("SELECT transfer FROM outbox_update")
    refusal = messages.Reject(transfer=transfer, code="late", reason="round 1 is closed", final=True)
    inbox = topics.inbox("f", "a", transfer)
    deliveries.uploader.handle(Message(inbox, messages.encode(refusal)))
    store.connection.close()
    again, link, *_ = deliveries_of(tmp_path)
    again.publish_owed()
    again.publish_owed()
    told = [(report.state, report.cause) for report in link.published]
    assert told == ([] if finished else [("failed", "refused")])


def test_a_report_that_the_version_before_has_kept_is_read_and_leaves_without_its_texts(
    tmp_path: Path,
) -> None:
    deliveries, link, _, store = deliveries_of(tmp_path)
    result = {"samples": 1, "losses": [], "step_seconds": [], "phases": {}, "seconds": {}}
    result |= {"measured_peak_bytes": 0, "payload_bytes": 0, "eased": ["in words"]}
    result |= {"evaluation": {"clinic": {"loss": 1.0, "accuracy": 0.0, "rows": 1}}}
    old = {"device": "a", "node_key": "", "round": 1, "state": "trained", "budget_bytes": 0}
    store.set("report", json.dumps({**old, "result": result, "reason": "line 3: a row"}))
    deliveries.publish_owed()
    (report,) = link.published
    assert report.result is not None and list(report.result.evaluation) == ["held_out_1"]
    sent = msgspec.json.encode(report)
    assert not any(word in sent for word in (b"clinic", b"in words", b"line 3"))
