"""Predicted beside measured peak memory of a device in fleets whose models learn from each other.

    make bench-peak ARGS=--across

A device of SmolLM2-135M, cut to a depth slice, is alone in its fleet. It takes part in some rounds,
each in a real trainer process, with the node's merges between them: it joins the common frame, makes
its maps and trains, and trains again with all passes of a step and the fleet's answers. The peak is
the highest of all phases of all rounds. All rows and public texts have the same length.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from benchmarks.memory import MIB
from edge_runtime import methods, settings
from edge_runtime.agent import local_round, measure
from edge_runtime.agent.store import DeviceStore
from edge_runtime.errors import TrainerError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.planning.candidates import candidates, predicted
from edge_runtime.planning.predict import Workload
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.settings import Fleet, Weights
from edge_runtime.simulation.versions import Versions
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Machine

STEPS, LABELS, HELD_OUT = 2, 20, 2


class Case(NamedTuple):
    """One line of the table."""

    about: str
    depth: int
    weights: Weights
    rows: int  # of a step; all go through the model at once
    tokens: int
    texts: int  # public
    tables: dict[str, dict[str, Any]]  # of the fleet file
    rounds: int = 2  # a class joins the frame in the first; the second pass of h2tune is in the third


HEAD, IN_FRAME = {"head": {}}, {"head": {"shared": "fleet"}}
DISTILS: dict[str, dict[str, Any]] = {"codistill": {"rows": 4}}
HETEROTUNE, H2TUNE, COLORA = ({"method": {"name": name}} for name in ("heterotune", "h2tune", "colora"))
MIXTURE = {"method": {"name": "heterotune", "form": "mixture"}}
CASES = (
    Case("heterotune, head in the frame", 3, "bfloat16", 8, 256, 64, HETEROTUNE | IN_FRAME),
    Case("heterotune as a mixture, head in the frame", 3, "bfloat16", 8, 256, 64, MIXTURE | IN_FRAME),
    Case(
        "heterotune of rank 64",
        15,
        "q4_1",
        1,
        64,
        64,
        HETEROTUNE | IN_FRAME | {"adapter": {"rank": 64}},
    ),
    Case("h2tune", 3, "q4_1", 4, 256, 64, H2TUNE, rounds=3),
    Case("h2tune, head", 15, "bfloat16", 4, 128, 64, H2TUNE | HEAD, rounds=3),
    Case("colora, head in the frame", 3, "bfloat16", 4, 512, 64, COLORA | IN_FRAME),
    Case("head in the frame", 2, "q4_1", 32, 8, 3000, IN_FRAME),
    Case("codistill, head", 2, "q4_1", 32, 8, 6000, DISTILS | HEAD),
    Case("codistill as text", 3, "q4_1", 8, 256, 24, DISTILS),
)


def show(source: Path) -> None:
    """Print each case as it is measured, then the range of their ratios; source: of the model."""
    facts = processes.prepared(str(source), Path.cwd())
    click.echo(
        "| fleet | layers | weights | rows x tokens | texts | predicted | measured | ratio | highest in |"
    )
    click.echo("|---" * 9 + "|")
    ratios = []
    for case in CASES:
        fleet, plan = planned(case, facts)
        with tempfile.TemporaryDirectory() as scratch:
            results = list(rounds(case, fleet, facts, plan, Path(scratch)))
        peaks = {
            f"{name}, round {number}": memory.peak_bytes
            for number, result in enumerate(results, 1)
            for name, memory in result.phases.items()
        }
        highest = max(peaks, key=peaks.__getitem__)
        sizes = plan.predicted_peak_bytes, peaks[highest]
        ratios.append(sizes[0] / sizes[1])
        cells = (
            case.about,
            str(case.depth),
            case.weights,
            f"{case.rows} x {case.tokens}",
            str(case.texts),
            *(f"{size / MIB:.0f}" for size in sizes),
            f"{ratios[-1]:.3f}",
            highest,
        )
        click.echo(f"| {' | '.join(cells)} |")
    click.echo(
        f"{len(ratios)} fleets, predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}, "
        f"median {statistics.median(ratios):.3f}"
    )


def planned(case: Case, facts: Facts) -> tuple[Fleet, Plan]:
    """The fleet, and the plan in which a step's rows go through the model at once."""
    training = {"steps": STEPS, "rows_a_step": case.rows, "max_tokens": case.tokens}
    tables: dict[str, Any] = {
        "fleet": {"name": "across", "rounds": case.rounds + 1},
        "catalog": [{"source": "model", "depth": case.depth, "weights": [case.weights]}],
        "public": {"file": "texts.jsonl", "texts": case.texts},
        "training": training,
        **case.tables,
    }
    fleet = settings.parse(tables)
    runtime, rates = processes.runtime_bytes(), processes.rates("cpu")
    plan = next(candidates(fleet, {"model": facts}, runtime, rates))[0]
    plan = msgspec.structs.replace(plan, rows=case.rows)
    return fleet, predicted(Workload(fleet, facts, runtime), rates, plan, lengths=1)


def rounds(case: Case, fleet: Fleet, facts: Facts, plan: Plan, folder: Path) -> Iterator[Result]:
    """The results of a device's rounds, each in a process of its own."""
    rows = measure.texts(STEPS * case.rows + HELD_OUT, case.tokens)
    if fleet.head is not None:
        rows = [{**row, "label": f"label {number % LABELS}"} for number, row in enumerate(rows)]
    held_out = data.write_rows(folder / "own.jsonl", rows[-HELD_OUT:])
    own = local_round.DeviceRows(data.write_rows(folder / "train.jsonl", rows[:-HELD_OUT]), {"own": held_out})
    texts = data.write_rows(folder / "texts.jsonl", measure.texts(case.texts, case.tokens))
    device = local_round.LocalRounds(folder / "device", DeviceStore(Path(":memory:")), own, Machine())
    versions = Versions(fleet, methods.of(fleet), folder / "versions")
    for number in range(1, case.rounds + 1):
        latest = versions.latest(facts.model_class)
        start = local_round.Start(latest.chain if latest else (), texts)
        job = device.job(number, fleet, facts, plan, start)
        local_round.write_job(device.folder(job), job)
        command = ["edge_runtime.trainer", str(device.folder(job))]
        processes.output(command, measure.TIMEOUT_S, TrainerError)
        result = local_round.read_result(device.folder(job))
        assert result is not None  # a trainer without a result has failed
        yield result
        device.keep(job, result)
        device.settle(number, "taken")
        payload = local_round.payload_of(device.folder(job), result)
        assert payload is not None
        versions.take(payload, "device", job, result.samples)
        versions.merge(number)
