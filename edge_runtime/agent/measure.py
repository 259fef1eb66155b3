"""Runs the real trainer in a process of its own for a few steps: its memory beside the prediction,
and beside PEFT's.

The rows are texts of exactly as many tokens as asked for, and every token is learned, so prediction
and measurement speak of the same batch.
"""

import os
import random
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_runtime.agent.local_round import read_result, write_job
from edge_runtime.errors import InputError, TrainerError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.planning.candidates import MLP_TOKENS, predicted
from edge_runtime.planning.predict import Workload
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import PhaseMemory, Result
from edge_runtime.settings import Adapter, Boundaries, Fleet, Model, Training, Weights
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Job, Machine

TIMEOUT_S = 3600.0
WARM_UP = 2  # steps that build what later steps reuse
WORDS = "the a of home light door garden water set turn on off seven please"


class Trial(NamedTuple):
    """The steps that are measured, by a plan's names; all rows of a step go through the model at once."""

    weights: Weights
    rank: int  # of the adapter, on all linear layers
    rows: int  # of a step
    tokens: int  # of a row
    steps: int
    boundaries: Boundaries = "input"
    streamed: bool = False  # packed weights stay in files
    kept_blocks: int = 0  # blocks that do not run again in backward


class Taken(msgspec.Struct, frozen=True):
    """Memory and time of a training process."""

    baseline_bytes: int  # of a trainer without a model
    measured_peak_bytes: int
    step_seconds: float  # median of the warm steps
    phases: dict[str, PhaseMemory]
    losses: list[float]  # of each step
    load_seconds: float  # until it can train


class Measurement(Taken, frozen=True):
    """The same of this project's trainer, with the prediction."""

    predicted_peak_bytes: int
    predicted_step_seconds: float
    terms: dict[str, int]  # predicted bytes, by what takes them
    peft: Taken | None = None  # PEFT's figures on the same rows, if it was run


def measure(
    source: str,
    models: Path,
    trial: Trial,
    *,
    peft: bool,
    random_weights: bool = False,
    machine: Machine,
) -> Measurement:
    """Train a model for a few steps.

    Args:
        source: as in a catalog.
        models: where relative paths are looked for.
        peft: run PEFT on the same rows too, in a process of its own.
        random_weights: draw the model that the source's config.json describes.
        machine: device of both processes, and their cap of the GPU.

    Raises:
        EdgeError: the model cannot be used, or a process failed; the message says why.
    """
    if peft and find_spec("peft") is None:
        raise InputError("PEFT is not installed: pip install peft")
    facts = processes.prepared(source, models, random_weights=random_weights)
    rows, tokens = trial.rows * trial.steps, trial.tokens
    if tokens > facts.positions:
        raise InputError(f"rows of {tokens} tokens are too long: {source} has {facts.positions} positions")
    fleet, prediction = planned(facts, facts.layers, trial, machine.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = train(facts, fleet, prediction, texts(rows, tokens), [], folder, machine)
        return Measurement(
            **msgspec.structs.asdict(taken(result)),
            predicted_peak_bytes=prediction.predicted_peak_bytes,
            predicted_step_seconds=prediction.step_seconds,
            terms=prediction.terms,
            peft=beside(folder) if peft else None,
        )


def taken(result: Result) -> Taken:
    """The figures of a trainer of this project."""
    return Taken(
        baseline_bytes=processes.runtime_bytes(),
        measured_peak_bytes=result.measured_peak_bytes,
        step_seconds=typical(result.step_seconds),
        phases=result.phases,
        losses=result.losses,
        load_seconds=result.seconds["load"],
    )


def typical(seconds: list[float]) -> float:
    """The median of steps that are warm."""
    return statistics.median(seconds[WARM_UP:] or seconds)


def planned(facts: Facts, depth: int, trial: Trial, device: str = "cpu") -> tuple[Fleet, Plan]:
    """A fleet of one model, and the plan in which a step goes through it at once."""
    fleet = Fleet(
        name="measure",
        catalog=(Model(source="model", depth=depth, weights=(trial.weights,)),),
        adapter=Adapter(rank=trial.rank),
        training=Training(steps=trial.steps, rows_a_step=trial.rows, max_tokens=trial.tokens),
    )
    fields = trial._asdict()
    del fields["steps"]
    bare = Plan(
        source="model",
        model_class=facts.model_class,
        depth=depth,
        layers=facts.layers,
        terms={},
        step_seconds=0.0,
        mlp_tokens=None if trial.streamed else MLP_TOKENS,
        **fields,
    )
    workload = Workload(fleet, facts, processes.runtime_bytes())
    return fleet, predicted(workload, processes.rates(device), bare, lengths=1)


def texts(count: int, tokens: int) -> list[dict[str, str]]:
    """Rows that are longer than so many tokens, and are cut to them."""
    draw = random.Random(0)
    return [{"text": " ".join(draw.choices(WORDS.split(), k=tokens))} for _ in range(count)]


def train(
    facts: Facts,
    fleet: Fleet,
    plan: Plan,
    rows: list[dict[str, str]],
    held_out: list[dict[str, str]],
    folder: Path,
    machine: Machine | None = None,
) -> Result:
    """Run the plan in a trainer process whose job lies in the folder.

    Raises:
        TrainerError: the process failed; the message is its last line.
    """
    job = Job(
        train=True,
        round=1,
        fleet=fleet,
        facts=facts,
        plan=plan,
        data=str(data.write_rows(folder / "train.jsonl", rows)),
        evaluation={"own": str(data.write_rows(folder / "own.jsonl", held_out))} if held_out else {},
        depths=(plan.depth,),
        machine=machine or Machine(),
    )
    write_job(folder, job)
    processes.output(["edge_runtime.trainer", str(folder)], TIMEOUT_S, TrainerError)
    result = read_result(folder)
    assert result is not None  # a trainer without a result has failed
    return result


def beside(folder: Path, *options: str) -> Taken:
    """The figures of PEFT for the job in the folder; with "--full", of training all parameters."""
    module = ["benchmarks.peft", str(folder), *options]
    # PEFT runs in the environment that its users have.
    try:
        written = processes.output(module, TIMEOUT_S, TrainerError, dict(os.environ))
    except TrainerError as error:
        raise TrainerError(f"PEFT's process: {error}") from error
    return msgspec.json.decode(written.splitlines()[-1], type=Taken)
