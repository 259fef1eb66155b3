"""Canonical keys: what the parser reads it builds again, and texts outside the grammar are refused."""

import re
from pathlib import Path

import pytest

import edge_runtime
from edge_runtime.errors import InputError
from edge_runtime.protocol.keys import Key, join, parse

PACKAGE = Path(edge_runtime.__file__).parent


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("layers.0.q.A", Key("layers", 0, "q", "A")),
        ("layers.29.fc1.keptB", Key("layers", 29, "fc1", "keptB")),
        ("stages.3.down.V", Key("stages", 3, "down", "V")),
        ("labels.red.H", Key("labels", "red", "", "H")),
        ("labels.a.b. c.H", Key("labels", "a.b. c", "", "H")),  # a label may hold dots
        ("labels.größe, 色.H", Key("labels", "größe, 色", "", "H")),
        ("anchors.layers.0.q.P", Key("anchors", "layers.0.q", "", "P")),
    ],
)
def test_a_key_is_read_and_built_again(text, key):
    assert parse(text) == key
    assert join(key.place, key.factor) == text
    if key.role:
        assert join(key.kind, key.owner, key.role, key.factor) == text
    else:
        assert join(key.kind, key.owner, key.factor) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "layers.0.A",
        "layers.0.q",
        "layers.00.q.A",
        "layers.-1.q.A",
        "layers.10000.q.A",
        "layers.٣.q.A",
        "layers.0.q.A\n",
        "layers.0.Q.A",
        "layers.0.q." + "A" * 17,
        "layers.0." + "q" * 17 + ".A",
        "models.0.q.A",
        "labels..H",
        "labels.red.h",
        "labels.red.HH",
        "labels.a\nb.H",
        "labels.\x1b[2J.H",
        "labels.\x9b2J.H",
        "labels.a\u2028b.H",
        "labels." + "a" * 81 + ".H",
    ],
)
def test_a_text_outside_the_grammar_is_refused(text):
    with pytest.raises(InputError, match="is no canonical key"):
        parse(text)


def test_no_other_file_takes_keys_apart_or_builds_them():
    grammar = re.compile(r'f"(layers|stages|labels|anchors)\..|key\.r?(split|partition)')
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "protocol" / "keys.py":
            assert not grammar.search(path.read_text()), f"{path} has a grammar of its own"
