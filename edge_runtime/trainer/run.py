"""A job, stage by stage: read rows, load base, start state, evaluate, train, answer, write.

Each stage frees its memory at its end. The tokenizer is gone before the base model is loaded, the
start of the round lies on disk while factors train, and the base model is gone before the delta is
encoded.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch

from edge_runtime import methods
from edge_runtime.adapters import attach
from edge_runtime.adapters.export import peft
from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.report import Result, Score
from edge_runtime.trainer import delta, disk
from edge_runtime.trainer.base import Base, Bases, load_base
from edge_runtime.trainer.cap import cap_gpu
from edge_runtime.trainer.delta import Sent
from edge_runtime.trainer.evaluate import evaluate
from edge_runtime.trainer.job import Job, Machine, Progress
from edge_runtime.trainer.meter import Meter, Reporter, release
from edge_runtime.trainer.public import DeviceAnswers, Distillation
from edge_runtime.trainer.read import Material, read
from edge_runtime.trainer.start import put_aside, start_state
from edge_runtime.trainer.train import Trained, train


def run(folder: Path, bases: Bases, say: Callable[[Progress], None]) -> None:
    """Do the job in a folder.

    Args:
        folder: holds job.json; receives the files that trainer/job.py names.
        bases: gives the tokenizer and the base model.
        say: receives each line of progress.

    Raises:
        InputError: the data, the model or the starting state does not fit the job.
        TrainerError: training failed.
    """
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    method = methods.build(job.fleet.method, job.fleet.head, job.fleet.codistill)
    prepare(job.machine)
    meter = Meter(job.machine.device)
    reporter = Reporter(meter, say)
    reporter.tell("load")
    with meter.phase("load"):
        material = read(job, bases.tokenizer(job.facts))
        release()  # the tokenizer's memory, before the model needs it
        base, adapter = load_base(job, method, bases, material.labels)
        public = material.public
        start, distillation = begin(job, method, adapter, material)
        # to disk: in memory, the start would cost one adapter more
        if job.train:
            put_aside(start, method, folder, reporter.tell)
        release()
    # before training: the scores are those of the version that the round starts from
    with meter.phase("evaluate"):
        scores = score(job, base, adapter, material, reporter)
    trained, sent = Trained([], [], [], job.plan.rows), Sent(0, None)
    if job.train:
        trained = train(job, method, base, adapter, material.examples, distillation, reporter)
        # nobody learns the answers of the last round
        if public is not None and job.round < job.fleet.rounds:
            public.answer(base.model, adapter, material.examples, trained.micro_rows, reporter)
        # the delta is encoded without the model in memory
        base.drop()
        reporter.tell("encode")
        with meter.phase("encode"):
            tokenizer = partial(bases.tokenizer, job.facts)
            answers = public.answers(tokenizer) if public is not None else DeviceAnswers()
            taught = material.met if distillation is None else set(material.labels)
            sent = delta.write(folder, adapter, method, taught, answers, job.carried, reporter.tell)
    else:
        base.drop()
        if job.export is not None:
            spec = job.fleet.adapter.at(job.plan.rank)
            peft.to_peft(start, job.facts, spec, method, adapter.paths, Path(job.export))
    result = summary(job, len(material.examples), scores, trained, sent, meter)
    # last: a result says that every other file is complete
    disk.replace(folder / "result.json", msgspec.json.encode(result), reporter.tell)
    reporter.tell("done")


def prepare(machine: Machine) -> None:
    """Hold this process to its share of the machine, before anything is allocated."""
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this device has a GPU, but the installed torch cannot use it: install its CUDA build, "
            "or use --device cpu"
        )
    if machine.gpu_cap_bytes is not None:
        cap_gpu(machine.gpu_cap_bytes)
    if machine.threads:
        torch.set_num_threads(machine.threads)


def begin(
    job: Job, method: Method, adapter: attach.Attached, material: Material
) -> tuple[attach.State, Distillation | None]:
    """Set the adapter to the round's start; returns that state, and the fleet's public answers."""
    shared = codec.decode(Path(job.start).read_bytes()) if job.start is not None else {}
    start = start_state(attach.state(adapter), shared, job.carried.private, method)
    attach.load_state(adapter, start)
    return start, material.public.lesson(shared) if material.public is not None else None


def score(
    job: Job, base: Base, adapter: attach.Attached, material: Material, reporter: Reporter
) -> dict[str, Score]:
    """Scores of the version that the round starts from, by the name of the held-out rows."""
    scores = {}
    for name, examples in material.held_out.items():
        reporter.tell(f"evaluate {name}")
        scores[name] = evaluate(base.model, adapter, examples, job.plan.rows)
    return scores


def summary(
    job: Job, rows: int, scores: dict[str, Score], trained: Trained, sent: Sent, meter: Meter
) -> Result:
    """The result of a job on so many rows."""
    training = job.fleet.training
    return Result(
        samples=min(rows, training.steps * training.rows_a_step),
        evaluation=scores,
        losses=[loss for loss in trained.losses if math.isfinite(loss)],
        skipped=sum(map(math.isnan, trained.losses)),
        easings=trained.easings,
        step_seconds=trained.step_seconds,
        phases=meter.phases,
        seconds=meter.seconds,
        measured_peak_bytes=meter.peak_bytes,
        payload_bytes=sent.payload_bytes,
        rank=sent.rank,
    )
