"""Runs the real trainer in a process of its own for a few steps: what it takes beside what was predicted, and beside PEFT.

The rows are text of exactly as many tokens as asked for, every token learned, so that prediction and measurement speak of
the same batch.
"""

import random
import signal
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import msgspec

from edge_runtime.agent.local_round import read_result, write_job
from edge_runtime.errors import InputError, TrainerError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.planning.predict import MLP_TOKENS
from edge_runtime.planning.search import Way, plan
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import PhaseMemory, Result
from edge_runtime.settings import Adapter, Boundaries, Fleet, Model, Training, Weights
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Job, Machine

TIMEOUT_S = 3600.0
WARM_UP = 2  # steps that build what later ones reuse
WORDS = (
    "the",
    "a",
    "of",
    "home",
    "light",
    "door",
    "garden",
    "water",
    "set",
    "turn",
    "on",
    "off",
    "seven",
    "please",
)


class Taken(msgspec.Struct, frozen=True):
    """What a training process took. losses: of each step; load_seconds: until it can train."""

    baseline_bytes: int
    measured_peak_bytes: int
    step_seconds: float
    phases: dict[str, PhaseMemory]
    losses: list[float]
    load_seconds: float


class Measurement(Taken, frozen=True):
    """The same of our trainer, with what was predicted and by what term; peft: of PEFT's, if it was run."""

    predicted_peak_bytes: int
    predicted_step_seconds: float
    terms: dict[str, int]
    peft: Taken | None = None


def measure(
    source: str,
    models: Path,
    *,
    weights: Weights,
    rank: int,
    rows: int,
    tokens: int,
    steps: int,
    device: str,
    peft: bool,
    boundaries: Boundaries = "input",
    streamed: bool = False,
    kept_blocks: int = 0,
    random_weights: bool = False,
    gpu_cap_bytes: int | None = None,
) -> Measurement:
    """Train a model for a few steps.

    Args:
        source: as in a catalog; models: where relative paths are looked for.
        rows, tokens: of a step, which goes through the model at once.
        kept_blocks: that do not run again in backward, of all.
        random_weights: draw the model that the source's config.json describes.
        peft: run PEFT on the same rows too, in a process of its own.
        gpu_cap_bytes: of the GPU, for each of the two processes.

    Raises:
        EdgeError: the model cannot be used, or a process failed; it says why.
    """
    if peft and find_spec("peft") is None:
        raise InputError("PEFT is not installed: pip install peft")
    facts = processes.prepared(source, models, random_weights=random_weights)
    if tokens > facts.positions:
        raise InputError(f"rows of {tokens} tokens are too long: {source} has {facts.positions} positions")
    way = Way(rows, boundaries, None if streamed else MLP_TOKENS, streamed, kept_blocks)
    fleet, made = planned(facts, facts.layers, weights, rank, way, tokens, steps, device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = train(facts, fleet, made, texts(rows * steps, tokens), [], folder, device, gpu_cap_bytes)
        return Measurement(
            **msgspec.structs.asdict(taken(result)),
            predicted_peak_bytes=made.predicted_peak_bytes,
            predicted_step_seconds=made.step_seconds,
            terms=made.terms,
            peft=beside(folder) if peft else None,
        )


def taken(result: Result) -> Taken:
    """The figures of one of our trainers."""
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


def planned(
    facts: Facts,
    depth: int,
    weights: Weights,
    rank: int,
    way: Way,
    tokens: int,
    steps: int,
    device: str = "cpu",
) -> tuple[Fleet, Plan]:
    """A fleet of one model, and the plan in which a step goes through it at once."""
    training = Training(steps=steps, rows_a_step=way.rows, max_tokens=tokens)
    catalog = (Model(source="model", depth=depth, weights=(weights,)),)
    fleet = Fleet(name="measure", catalog=catalog, rounds=1, adapter=Adapter(rank=rank), training=training)
    made = plan(
        fleet,
        facts,
        "model",
        depth,
        weights,
        tokens=tokens,
        rank=rank,
        way=way,
        runtime_bytes=processes.runtime_bytes(),
        rates=processes.rates(device),
        lengths=1,
    )
    return fleet, made


def texts(count: int, tokens: int) -> list[dict[str, str]]:
    """Rows that are longer than so many tokens, and are cut to them."""
    draw = random.Random(0)
    return [{"text": " ".join(draw.choices(WORDS, k=tokens))} for _ in range(count)]


def train(
    facts: Facts,
    fleet: Fleet,
    plan: Plan,
    rows: list[dict[str, str]],
    held_out: list[dict[str, str]],
    folder: Path,
    device: str = "cpu",
    gpu_cap_bytes: int | None = None,
) -> Result:
    """Run the plan in a trainer process whose job lies in the folder."""
    job = Job(
        train=True,
        round=1,
        fleet=fleet,
        facts=facts,
        plan=plan,
        data=str(data.write_rows(folder / "train.jsonl", rows)),
        evaluation={"own": str(data.write_rows(folder / "own.jsonl", held_out))} if held_out else {},
        depths=(plan.depth,),
        machine=Machine(device=device, gpu_cap_bytes=gpu_cap_bytes),
    )
    write_job(folder, job)
    _run("edge_runtime.trainer", folder, processes.environment())
    result = read_result(folder)
    assert result is not None  # `_run` raises where there is none
    return result


def beside(folder: Path, *more: str) -> Taken:
    """What PEFT takes for the job in the folder; or, with "--full", the training of all parameters."""
    written = _run("benchmarks.peft", folder, None, *more)  # in the environment that its users have
    return msgspec.json.decode(written.splitlines()[-1], type=Taken)


def _run(module: str, folder: Path, environment: dict[str, str] | None, *more: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), *more],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode == -signal.SIGKILL:
        raise TrainerError(f"{module} was killed, most likely because the machine ran out of memory")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"it ended with exit code {done.returncode}"
        ]
        raise TrainerError(f"{module}: {said[-1]}")
    return done.stdout
