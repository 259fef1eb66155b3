"""What a broken or hostile device sends of labels and features is refused in a sentence that names it."""

import numpy as np
import pytest

from edge_runtime import methods, settings
from edge_runtime.aggregator import check
from edge_runtime.errors import InputError
from edge_runtime.methods import frames
from edge_runtime.protocol import codec, completion, payload

TEXTS, WIDTH = 2, 3
TABLES = {
    "fleet": {"name": "f"},
    "catalog": [{"source": "m"}],
    "adapter": {"rank": 2},
    "head": {},
    "public": {"file": "public.jsonl", "texts": TEXTS},
    "codistill": {},
}


def checked(shapes, expected=None, tables=TABLES):
    """The keys that the node takes of a delta of zeros."""
    fleet = settings.parse(tables)
    payload = codec.encode({key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    return check.check(payload, expected or {}, fleet, methods.of(fleet)).keys()


def test_predictions_make_no_more_labels_than_a_head_has(monkeypatch):
    monkeypatch.setattr(check, "MOST_LABELS", 3)
    rows = {f"labels.{label}.H": (1, WIDTH) for label in "ab"}
    predictions = {f"anchors.{label}.P": (1, TEXTS) for label in "bc"}
    assert checked({**rows, **predictions}) == {*rows, *predictions}
    one_more = {"anchors.d.P": (1, TEXTS)}
    for delta, expected in (({**rows, **predictions, **one_more}, {}), (one_more, {**rows, **predictions})):
        with pytest.raises(InputError, match="makes 4 labels, but a head has at most 3"):
            checked(delta, expected)


def test_a_device_has_one_row_a_label():
    """K of a label that its class has examples of is another device's, and may come before or after H."""
    first, second = ({f"labels.red.{name}": (1, WIDTH)} for name in "HK")
    assert checked(first, second) == first.keys() and checked(second, first) == second.keys()
    with pytest.raises(InputError, match="rows H and K of the label red, but one device has one"):
        checked({**first, **second})


@pytest.mark.parametrize(
    "key", ["layers.\x1b[2J", "layers.0.q.A\nnode: all is well", "labels.\x9b2J.H", "\u2028" * 500]
)
def test_a_key_that_would_write_on_the_node_s_screen_is_shown_in_escapes(key):
    _, sections = payload.read(codec.encode({"labels.a.H": np.zeros((1, WIDTH), np.float32)}))
    fleet = settings.parse(TABLES)
    content = payload.assemble(payload.Header({key: (1, WIDTH)}), sections)
    with pytest.raises(InputError, match="which this fleet's adapter does not exchange") as refused:
        check.check(content, {}, fleet, methods.of(fleet))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 700


def test_features_come_without_completions():
    """Their device has not learned anything yet, and its rows would count against who has."""
    tables = {name: table for name, table in TABLES.items() if name != "head"}
    fleet = settings.parse({**tables, "method": {"name": "heterotune"}, "public": {"file": "p", "texts": 40}})
    method = methods.of(fleet)
    X = frames.features(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    answers = completion.encode([completion.Completion(0, "yes", 0.5)])
    assert check.check(codec.encode({frames.SENT: X}), {}, fleet, method).keys() == {frames.SENT}
    assert check.check(codec.encode({}, answers), {frames.SENT: X.shape}, fleet, method) == {}
    with pytest.raises(InputError, match="beside other tensors or answers"):
        check.check(codec.encode({frames.SENT: X}, answers), {}, fleet, method)
