"""When a device keeps its plan, when it plans again, and for how much memory."""

from pathlib import Path
from queue import Queue

import msgspec
import pytest
from architectures import RATES, SMOLLM2

from benchmarks.noise import FACTS, PLAN
from edge_runtime.agent import planner
from edge_runtime.agent.options import DeviceOptions, ServeOptions
from edge_runtime.agent.planner import SMALLER, Planned, Planner, Unplanned, find_plan
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.planning.predict import Serving
from edge_runtime.serving.endpoint import Endpoint
from edge_runtime.settings import Fleet, MethodChoice, Model, Public

FLEET = Fleet("f", (Model("m"),))
TIMEOUT_S = 60.0
TERMS = {"runtime": 100, "weights": 200, "activations": 50}


class Device:
    """A planner whose threads answer every request at once, with one plan."""

    def __init__(self, **changes):
        self.plan = msgspec.structs.replace(PLAN, terms=TERMS, **changes)
        self.requests, self.answers = [], Queue()
        self.planner = Planner(1000, self.find, self.answers.put)

    def find(self, request):
        self.requests.append(request)
        return Planned(request, self.plan, FACTS)

    def planned(self, fleet=FLEET, rank_limit=None):
        """The request that a new plan answers; None where the one before serves."""
        if self.planner.plan(fleet, rank_limit) is not None:
            return None
        self.planner.take(self.answers.get(timeout=TIMEOUT_S))
        return self.requests[-1]


def test_a_plan_serves_until_what_it_depends_on_changes():
    device = Device()
    assert device.planned() is not None
    assert device.planned() is None
    assert device.planned(rank_limit=4).rank_limit == 4
    assert device.planned(msgspec.structs.replace(FLEET, rounds=9)).fleet.rounds == 9


def test_one_thread_plans_at_a_time():
    device = Device()
    assert device.planner.plan(FLEET, None) is None
    assert device.planner.plan(FLEET, 4) is None  # waits for the first answer, and is asked again
    device.planner.take(device.answers.get(timeout=TIMEOUT_S))
    assert [request.rank_limit for request in device.requests] == [None]
    assert device.planned(rank_limit=4).rank_limit == 4


def test_a_killed_trainer_gives_up_what_only_saves_time_before_it_plans_smaller():
    device = Device(kept_blocks=3)
    assert device.planned()[1:3] == (1000, True)
    device.planner.shrink(device.plan, killed=True)
    assert device.planned()[1:3] == (1000, False)
    device.planner.shrink(msgspec.structs.replace(device.plan, kept_blocks=0), killed=True)
    assert device.planned()[1:3] == (100 + int(SMALLER * 200), False)


def test_a_trainer_that_ended_itself_for_memory_plans_smaller_at_once():
    device = Device(kept_blocks=3)
    device.planner.shrink(device.plan, killed=False)
    assert device.planned()[1:3] == (100 + int(SMALLER * 200), False)


def test_a_trainer_that_was_short_of_memory_leaves_a_server_its_part():
    device = Device(kept_blocks=3)
    device.planned()
    device.planner.shrink(msgspec.structs.replace(device.plan, serving_bytes=50), killed=False)
    assert device.planned()[1] == 100 + int(SMALLER * 200) + 50


def raising(error):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize(
    ("stage", "error", "cause"),
    [
        ("prepared", InputError("no such model"), "model"),
        ("rates", InputError("no GPU"), "machine"),
        ("runtime_bytes", EdgeError("no torch"), "machine"),
        ("prepared", ValueError("line 3: a row"), "internal"),
    ],
)
def test_a_failure_is_told_by_its_stage(monkeypatch, stage, error, cause):
    for name in ("prepared", "rates", "runtime_bytes"):
        answer = raising(error) if name == stage else lambda *_: None
        monkeypatch.setattr(planner.processes, name, answer)
    options = DeviceOptions(*[None] * 4, Path(), *[None] * 8)  # type: ignore[arg-type]
    unplanned = find_plan(planner.Request(FLEET, 1000, True, None), options)
    assert isinstance(unplanned, Unplanned) and unplanned.cause == cause


def test_torch_serves_where_the_graph_cannot_be_written(monkeypatch):
    for name, answer in (("catalog_facts", {"m": SMOLLM2}), ("rates", RATES), ("runtime_bytes", 300 << 20)):
        monkeypatch.setattr(planner.processes, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(planner, "with_onnx", lambda size, *_: size._replace(onnx_bytes=90 << 20))
    serve = ServeOptions(Endpoint("127.0.0.1", 1), Serving())
    options = DeviceOptions(*[None] * 4, Path(), *[None] * 8, serve)  # type: ignore[arg-type]
    seen = {}
    for fault in (None, InputError("the disk is full")):
        monkeypatch.setattr(planner, "graph", raising(fault) if fault else lambda *_: None)
        seen[fault is None] = find_plan(planner.Request(FLEET, 1 << 40, True, None), options)
    assert (seen[True].plan.server, seen[False].plan.server) == ("onnx", "torch")
    assert seen[False].server == "torch serves: the disk is full"


@pytest.mark.parametrize(("form", "cause"), [("mixture", "input"), ("linear", "model")])
def test_a_fleet_whose_adapter_cannot_be_served_is_refused_before_its_models_are_looked_for(
    form, cause, monkeypatch
):
    monkeypatch.setattr(planner.processes, "prepared", raising(InputError("no such model")))
    method = MethodChoice("heterotune", {"form": form})
    fleet = msgspec.structs.replace(FLEET, method=method, public=Public("public.jsonl"))
    options = DeviceOptions(*[None] * 4, Path(), *[None] * 8)  # type: ignore[arg-type]
    assert find_plan(planner.Request(fleet, 1000, True, None), options).cause == "model"
    for asked in ({"serve": ServeOptions(Endpoint("127.0.0.1", 1), Serving())}, {"on_version": ("true",)}):
        unplanned = find_plan(planner.Request(fleet, 1000, True, None), options._replace(**asked))
        assert isinstance(unplanned, Unplanned) and unplanned.cause == cause
        refused = "depend on the token, so its adapter is no LoRA, and nothing can answer with it: leave out"
        assert (refused in str(unplanned.error)) == (form == "mixture")
