"""Which slices a device trains in turn, and what of a round the next one goes on from."""

import pytest
from edge_broker import messages
from edge_broker.transfer import Committed, Rejected

from edge_runtime.agent import work
from edge_runtime.agent.store import Store
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Fleet, Model, Training

CATALOG = (Model("a"), Model("a", depth=20), Model("b", depth=15), Model("a", depth=10))


@pytest.mark.parametrize(
    ("source", "depth", "slices", "depths"),
    [
        ("a", 30, "nested", (30, 20, 10)),
        ("a", 20, "nested", (20, 10)),
        ("a", 10, "nested", (10,)),
        ("b", 15, "nested", (15,)),
        ("a", 30, "own", (30,)),
    ],
)
def test_a_device_trains_the_smaller_slices_of_its_checkpoint(source, depth, slices, depths):
    fleet = Fleet("f", CATALOG, training=Training(slices=slices))
    plan = Plan(source, "class", depth, 30, "float32", rank=4, rows=1, tokens=8, terms={}, step_seconds=1.0)
    assert work.depths(fleet, plan) == depths


@pytest.mark.parametrize(
    ("settled", "residual", "unsent"),
    [
        (lambda of: Committed(of), "2", None),
        (lambda of: Rejected(of, "late", "round 2 is closed", True), "2", "2"),
        (lambda of: Rejected(of, "content", "it has diverged", True), None, None),
        (lambda of: Rejected(of, "payload", "no such file", True), None, None),
    ],
)
def test_what_was_refused_is_owed_unless_it_would_spoil_the_next_one_too(tmp_path, settled, residual, unsent):
    store = Store(tmp_path / "agent.db")
    for name in ("residual", "unsent"):
        store.set(name, "1")
    folder = work.folder_of(tmp_path, 2)
    folder.mkdir()
    (folder / "residual.bin").touch()
    of = messages.describe(
        b"delta", fleet="f", device="d", round=2, model_class="m", codec="c", samples=1, chunk_bytes=8
    )
    work.settle(tmp_path, store, settled(of))
    assert (store.get("residual"), store.get("unsent")) == (residual, unsent)
