"""Which slices a device trains in turn, and what of a round the next one goes on from."""

from pathlib import Path

import msgspec
import pytest

from benchmarks.noise import FACTS, PLAN
from edge_runtime.agent.local_round import DeviceRows, LocalRounds, Start, depths, read_result, write_job
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.settings import Fleet, Model, Training
from edge_runtime.trainer.job import Carried, Job, Machine

CATALOG = (Model("a"), Model("a", depth=20), Model("b", depth=15), Model("a", depth=10))


@pytest.mark.parametrize(
    ("source", "depth", "slices", "expected"),
    [
        ("a", 30, "nested", (30, 20, 10)),
        ("a", 20, "nested", (20, 10)),
        ("a", 10, "nested", (10,)),
        ("b", 15, "nested", (15,)),
        ("a", 30, "own", (30,)),
    ],
)
def test_a_device_trains_the_smaller_slices_of_its_checkpoint(source, depth, slices, expected):
    fleet = Fleet("f", CATALOG, training=Training(slices=slices))
    plan = Plan(source, "class", depth, 30, "float32", rank=4, rows=1, tokens=8, terms={}, step_seconds=1.0)
    assert depths(fleet, plan) == expected


class Device:
    """A device's rounds in a folder, with a real store."""

    def __init__(self, folder: Path) -> None:
        self.store = DeviceStore(folder / "agent.db")
        rows = DeviceRows(folder / "rows.jsonl", {"own": folder / "own.jsonl"})
        self.rounds = LocalRounds(folder / "work", self.store, rows, Machine(threads=1), folder / "adapter")
        self.fleet = Fleet("f", CATALOG)

    def job(self, number: int, *, train: bool = True, rank: int = 8) -> Job:
        plan = msgspec.structs.replace(PLAN, rank=rank)
        return self.rounds.job(number, self.fleet, FACTS, plan, Start(), train=train)

    def leave(self, number: int, *names: str) -> Path:
        """Write the files that a trainer leaves."""
        folder = self.rounds.folder(self.job(number))
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        return folder


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path)


def result(**fields):
    needed = {"samples": 1, "measured_peak_bytes": 0, "payload_bytes": 0}
    needed |= {"evaluation": {}, "losses": [], "step_seconds": [], "phases": {}, "seconds": {}}
    return Result(**{**needed, **fields})


@pytest.mark.parametrize(
    ("verdict", "residual", "unsent"),
    [("taken", "2", None), ("refused", "2", "2"), ("spoilt", None, None)],
)
def test_what_was_refused_is_owed_unless_it_would_spoil_the_next_one_too(device, verdict, residual, unsent):
    for name in ("residual", "unsent"):
        device.store.set(name, "1")
    device.leave(2, "residual.bin")
    device.rounds.settle(2, verdict)
    assert (device.store.get("residual"), device.store.get("unsent")) == (residual, unsent)


def test_a_job_carries_what_earlier_rounds_have_left_though_the_folder_has_moved(tmp_path):
    (tmp_path / "before").mkdir()
    before = Device(tmp_path / "before")
    before.leave(1, "state.bin", "residual.bin", "payload.bin")
    before.rounds.keep(before.job(1), result())
    before.rounds.settle(1, "refused")
    before.store.connection.close()
    after = Device((tmp_path / "before").rename(tmp_path / "after"))
    job = after.job(2)
    folder = tmp_path / "after" / "work" / "round-1"
    left = {"private": "state.bin", "residual": "residual.bin", "unsent": "payload.bin"}
    assert job.carried == Carried(**{name: str(folder / file) for name, file in left.items()})
    assert job.evaluation == {"own": str(tmp_path / "after" / "own.jsonl")}


def test_a_job_carries_what_the_device_sent_to_the_very_version_that_it_starts_from(device):
    for number in (1, 2):
        device.leave(number, "payload.bin")
        device.rounds.settle(number, "taken")
    sent = str(device.rounds.folder(device.job(2)) / "payload.bin")
    assert device.job(3).carried.sent == sent  # of the version after round 2
    assert device.job(2, train=False).carried.sent == sent  # as at the end of a fleet of 2 rounds
    assert device.job(4).carried.sent is None  # the device was not in round 3
    device.leave(3, "payload.bin")
    device.rounds.settle(3, "refused")
    assert device.job(4).carried.sent is None


def test_a_trainer_is_held_to_what_a_server_leaves_it(tmp_path):
    store, machine = DeviceStore(tmp_path / "agent.db"), Machine(budget_bytes=1000)
    rounds = LocalRounds(tmp_path / "work", store, DeviceRows(tmp_path / "rows.jsonl", {}), machine)
    budgets = [
        rounds.job(1, Fleet("f", CATALOG), FACTS, plan, Start()).machine.budget_bytes
        for plan in (PLAN, msgspec.structs.replace(PLAN, serving_bytes=300))
    ]
    assert budgets == [1000, 700]


def test_each_job_writes_the_newest_adapter_to_one_folder(device, tmp_path):
    last = device.job(3, train=False)
    assert {last.export, device.job(2).export} == {str(tmp_path / "adapter")}
    assert device.rounds.folder(last).name == "finished"


def test_a_rank_that_the_method_has_lowered_holds_until_a_fleet_begins_anew(device):
    device.rounds.keep(device.job(1), result(rank=4))
    assert [device.rounds.rank_limit(number) for number in (1, 2)] == [None, 4]
    device.rounds.keep(device.job(2, rank=4), result(rank=4))
    assert device.rounds.rank_limit(3) == 4
    device.rounds.keep(device.job(1), result(rank=8))
    assert device.rounds.rank_limit(2) is None


def test_rounds_that_nobody_needs_are_deleted(device):
    for number in (1, 2, 3, 4):
        device.leave(number, "state.bin", "residual.bin")
    device.rounds.keep(device.job(2), result())
    device.rounds.settle(3, "taken")
    device.rounds.tidy([4])
    remaining = {device.rounds.folder(device.job(number)) for number in (2, 3, 4)}
    assert {*device.rounds.folder(device.job(1)).parent.iterdir()} == remaining


def test_the_result_of_an_earlier_attempt_is_not_taken_for_this_ones(device):
    folder = device.leave(1)
    assert read_result(folder) is None
    (folder / "result.json").write_bytes(msgspec.json.encode(result(samples=3)))
    assert read_result(folder) == result(samples=3)
    write_job(folder, device.job(1))
    assert read_result(folder) is None
