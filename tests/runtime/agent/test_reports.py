"""What may stand in a report: numbers, fixed words, and the texts listed here with their reason."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import msgspec.inspect as inspect
import pytest
from edge_broker import address, messages, signing
from edge_broker.outbox import Outbox

from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.reports import Reports
from edge_runtime.agent.stages import RoundInProgress
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.report import REPORT_DOMAIN, Report, Result, Score, without_names
from edge_runtime.protocol.round import Round
from edge_runtime.settings import Fleet, Model

TEXTS = {
    "Report.device": "the id the device joined with, which is part of each topic",
    "Report.node_key": "had from the node",
    "Plan.source": "had from the node: the catalog's source",
    "Plan.model_class": "the source's last part and a digest of the weights",
    "Plan.terms": "names of the planner's terms",
    "Result.evaluation": "numbered by `without_names` before a report leaves",
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
    scores = {"clinic": Score(1.0, 0.0, 1), "street": Score(2.0, 0.0, 1)}
    result = Result(
        samples=1,
        evaluation=scores,
        losses=[],
        step_seconds=[],
        phases={},
        seconds={},
        measured_peak_bytes=0,
        payload_bytes=0,
    )
    numbered = without_names(result)
    assert numbered.evaluation == {"held_out_1": scores["clinic"], "held_out_2": scores["street"]}
    assert without_names(numbered) == numbered


class Link:
    """A session that is never connected, and keeps what is published."""

    chunk_bytes = 1024
    traffic = NamedTuple("Traffic", [("bytes_up", int), ("bytes_down", int)])(0, 0)

    def __init__(self) -> None:
        self.published: list[Report] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        body, _ = signing.open(payload, REPORT_DOMAIN, None)
        self.published.append(msgspec.json.decode(body, type=Report))


def reports_of(folder: Path) -> tuple[Reports, Link, Outbox, DeviceStore]:
    store, link = DeviceStore(folder / "agent.db"), Link()
    outbox = Outbox(store.connection, folder)
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
    return Reports(link, store, outbox, options, key), link, outbox, store  # type: ignore[arg-type]


@pytest.mark.parametrize("finished", [False, True])
def test_that_an_update_was_refused_is_kept_until_it_is_said(tmp_path: Path, finished: bool) -> None:
    """A kill may come right after the refusal. After the last round no node waits for it."""
    reports, link, outbox, store = reports_of(tmp_path)
    fleet = Fleet("f", (Model("m"),), rounds=1)
    current = RoundInProgress(Round(node="n", fleet=fleet, round=1, state="open", versions={}), "key")
    described = {"fleet": "f", "device": "a", "round": 1, "model_class": "m", "codec": "c"}
    (tmp_path / "delta").write_bytes(b"delta")
    manifest = messages.describe(tmp_path / "delta", messages.Origin(samples=1, **described), 8)  # type: ignore[arg-type]
    with outbox.transaction():
        reports.owe(reports.of(current, "trained", None))
        outbox.add(manifest, tmp_path / "delta")
    reports.publish_owed()
    assert link.published == []  # the node has not taken the update yet
    with outbox.transaction():
        reports.refused(1, tell=not finished)
        outbox.settle(manifest.transfer, "rejected", "late", "round 1 is closed")
    store.connection.close()
    again, link, _, store = reports_of(tmp_path)
    again.publish_owed()
    again.publish_owed()
    told = [(report.state, report.cause) for report in link.published]
    assert told == ([] if finished else [("failed", "refused")])


def test_a_report_that_the_version_before_has_kept_is_read_and_leaves_without_its_texts(
    tmp_path: Path,
) -> None:
    reports, link, _, store = reports_of(tmp_path)
    result = {"samples": 1, "losses": [], "step_seconds": [], "phases": {}, "seconds": {}}
    result |= {"measured_peak_bytes": 0, "payload_bytes": 0, "eased": ["in words"]}
    result |= {"evaluation": {"clinic": {"loss": 1.0, "accuracy": 0.0, "rows": 1}}}
    old = {"device": "a", "node_key": "", "round": 1, "state": "trained", "budget_bytes": 0}
    store.set("report", json.dumps({**old, "result": result, "reason": "line 3: a row"}))
    reports.publish_owed()
    (report,) = link.published
    assert report.result is not None and list(report.result.evaluation) == ["held_out_1"]
    sent = msgspec.json.encode(report)
    assert not any(word in sent for word in (b"clinic", b"in words", b"line 3"))
