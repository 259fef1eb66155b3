"""What may stand in a report: numbers, fixed words, and the few texts that are listed here with their reason."""

from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest

from edge_runtime.protocol.report import Report, Result, Score, without_names

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
