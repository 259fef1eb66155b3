"""A job, stage by stage: read rows, load base, start state, evaluate, train, answer, write.

Each stage frees its memory at its end. The tokenizer is gone before the base model is loaded, the
start of the round lies on disk while factors train, and the base model is gone before the delta is
encoded.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edge_runtime import methods
from edge_runtime.adapters import attach, learned
from edge_runtime.adapters.versions import published
from edge_runtime.errors import InputError
from edge_runtime.methods import frames
from edge_runtime.methods.interface import Method
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol.report import Result, Score
from edge_runtime.trainer import data, delta, disk, head
from edge_runtime.trainer.base import Base, Bases, load_base
from edge_runtime.trainer.completions import Completions
from edge_runtime.trainer.delta import Sent
from edge_runtime.trainer.examples import Example, Examples, first_rows, order_of
from edge_runtime.trainer.frame import Frame
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.job import Job, Progress
from edge_runtime.trainer.lesson import Distillation
from edge_runtime.trainer.meter import Meter, prepare
from edge_runtime.trainer.objectives import evaluate
from edge_runtime.trainer.public import DeviceAnswers, Predictions
from edge_runtime.trainer.states import sampled
from edge_runtime.trainer.tokens import TeachesNothing, Tokenization
from edge_runtime.trainer.train import Trained, train

NAMED = 10  # rows that a sentence names


def run(folder: Path, bases: Bases, say: Callable[[Progress], None]) -> None:
    """Do the job of a folder's job.json; the folder receives the files that trainer/job.py names.

    Raises:
        InputError: the data, the model or the starting state does not fit the job.
        TrainerError: training failed.
    """
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    method = methods.of(job.fleet)
    prepare(job.machine)
    meter = Meter(job.machine.device, say)
    meter.tell("load")
    with meter.phase("load"):
        material = read(job, folder, bases.tokenizer(job.facts), framed=method.framed)
        for sentence in material.told:
            meter.tell("load", text=sentence)
        release()  # the tokenizer's memory, before the model needs it
        base = load_base(job, method, bases, material.labels, material.heard)
        joins, distillation = begin(job, method, base, material, folder, meter)
        release()
    # before training: the scores are those of the version that the round starts from
    scores = {}
    with meter.phase("evaluate"):
        for name, examples in material.held_out.items():
            meter.tell(f"evaluate {name}")
            scores[name] = evaluate(base.model, base.adapter, examples, job.plan.rows)
    trained, sent, public = Trained([], [], []), Sent(0, None), material.public
    if job.train and joins is not None:
        features = joins.features(base, meter)
    elif job.train:
        if material.labels and job.fleet.head is not None:
            head.begin(base, material.examples, distillation, job.fleet.head, meter)
        trained = train(job, method, base, material.examples, distillation, meter)
        # nobody learns the answers of the last round
        if public is not None and job.round < job.fleet.rounds:
            public.answer(base, material.examples, meter)
    # the delta is encoded without the model in memory
    base.drop()
    if job.train and joins is not None:
        sent = delta.write_answers(folder, features, meter.tell)
    elif job.train:
        meter.tell("encode")
        with meter.phase("encode"):
            tokenizer = partial(bases.tokenizer, job.facts)
            answers = public.answers(tokenizer) if public is not None else DeviceAnswers()
            taught = material.met if distillation is None else set(material.labels)
            sent = delta.write(folder, base.adapter, method, taught, answers, job, meter.tell)
            if not method.exchanges:  # what the device has trained is its next version
                keep(job, method, attach.state(base.adapter), job.round, meter.tell)
    result = _result(job, material, scores, trained, sent, meter)
    # last: a result says that every other file is complete
    disk.save(folder / "result.json", msgspec.json.encode(result), meter.tell)
    meter.tell("done")


def begin(
    job: Job, method: Method, base: Base, material: "Material", folder: Path, meter: Meter
) -> tuple[Frame | None, Distillation | None]:
    """Set the adapter to the round's start, which goes to the folder.

    Returns:
        The common frame, if the method needs one that the device's class is not in; and the lesson
        of the fleet's answers to public texts, if there is one.
    """
    shared = published(map(Path, job.start), job.fleet.seed, method)
    joins = None
    if method.framed:
        frame = Frame(job, material.texts, shared.pop(frames.MADE, None))
        joins = frame if frame.new else None
        if maps := frame.enter(base, meter):
            disk.save(folder / "frame.bin", maps, meter.tell)
    if method.received is not None:
        method.received(shared, delta.sent_before(job))
    share = job.plan.rank / job.fleet.adapter.rank
    state = delta.start(base.adapter, shared, job.carried.private, method, share)
    lesson = material.public.lesson(shared) if material.public is not None else None
    # in memory, the global version and the start would cost an adapter each
    del shared
    keep(job, method, state, job.round - 1 if job.train else job.round, meter.tell)
    if job.train and joins is None:
        delta.put_aside(state, method, folder, meter.tell)
    return joins, lesson


def keep(job: Job, method: Method, state: attach.State, version: int, tell: Callable[..., object]) -> None:
    """Write the adapter in this state to the job's folder for exports, if the job has one."""
    if job.export is None:
        return
    if method.branch is not None:
        tell(
            "keep",
            text=f"the branches of {method.name} depend on the token: no adapter is written, as it is no LoRA",
        )
        return
    layers, spec = kept_layers(job.plan.depth, job.facts.layers), job.fleet.adapter.at(job.plan.rank)
    adapter, folder = learned.fold(state, job.facts, layers, spec, method, version), Path(job.export)
    disk.patiently(partial(learned.write, adapter, folder), folder.parent, tell)


class Material(NamedTuple):
    """Everything that a job reads before it loads the model."""

    examples: Examples  # those of the device's own rows that the round needs
    held_out: dict[str, Examples]  # by name
    labels: list[str]  # that the head tells apart; none: no head
    met: set[str]  # labels of the device's own rows, where there is a head
    heard: frozenset[str]  # of the labels, those whose row is K (methods/label_head.py)
    public: Completions | Predictions | None
    texts: list[Example]  # public, where the method needs the common frame
    empty: int  # rows that the round needs and that teach nothing
    told: list[str]  # sentences about such rows, held-out ones too


def read(job: Job, folder: Path, tokenizer: Any, *, framed: bool = False) -> Material:
    """Read and tokenize; raises InputError naming the file, line or setting that does not fit.

    folder: where tokens are put. Of the rows, which may be many, only those that the steps of the
        round draw are tokenized.
    framed: whether the method needs the common frame.
    """
    path = Path(job.data)
    met = data.labels_of(data.stream(path)) if job.fleet.head is not None else set()
    labels, heard = head.labels(job, met)
    numbers = {label: number for number, label in enumerate(labels)}
    how = Tokenization(tokenizer, job.facts.vocabulary, job.plan.tokens, numbers or None)

    texts = _texts(job)
    public = _public(job, texts, labels, met, how)
    count = data.count_rows(path) if job.train else 0
    needed = _needed(job, count, sampled(count) if public is not None else range(0))
    examples, empty = _examples(how, path, needed, count, folder)
    told = _told(path, empty, len(needed))
    held_out = {}
    for name, file in job.evaluation.items():
        every = range(data.count_rows(Path(file)))
        held_out[name], without = _examples(how, Path(file), every, len(every), folder)
        told += _told(Path(file), without, len(every))
    return Material(
        examples=examples,
        held_out=held_out,
        labels=labels,
        met=met,
        heard=heard,
        public=public,
        texts=_in_frame(how, texts) if framed else [],
        empty=len(empty),
        told=told,
    )


def _examples(
    how: Tokenization, path: Path, numbers: Sequence[int], count: int, folder: Path
) -> tuple[Examples, list[int]]:
    """Examples of the rows with these numbers, which rise, of `count`; and the rows that teach nothing."""
    chosen = numbers if isinstance(numbers, range) else set(numbers)
    empty: list[int] = []

    def numbered() -> Iterator[tuple[int, Example]]:
        for number, row in zip(numbers, data.stream(path, chosen), strict=False):
            try:
                yield number, how.example(row)
            except TeachesNothing:
                empty.append(number)
            except InputError as error:
                raise InputError(f"{path}, row {number + 1}: {error}") from error

    examples = Examples(count, numbered() if numbers else (), folder)
    if len(examples) + len(empty) < len(numbers):
        raise InputError(f"{path} has become shorter while it was read: wait until it is complete")
    if empty and not len(examples):
        raise InputError(
            f"{path}: none of the {len(empty)} rows that are needed has a token to learn: give rows with an answer, or "
            "raise the most tokens of a row (max_tokens)"
        )
    return examples, empty


def _told(path: Path, empty: list[int], read: int) -> list[str]:
    """A sentence for this device's screen about rows that teach nothing, if there are any."""
    if not empty:
        return []
    names = ", ".join(str(number + 1) for number in empty[:NAMED]) + (", ..." if len(empty) > NAMED else "")
    return [
        f"{path}: {len(empty)} of {read} rows are passed over, as they have no token to learn: row {names}"
    ]


def _needed(job: Job, count: int, compared: range) -> Sequence[int]:
    """The numbers of the rows that the round's steps take, and of those compared with public texts."""
    taken = job.fleet.training.steps * job.fleet.training.rows_a_step
    first = first_rows(count, taken, order_of(job.fleet.seed, job.round))
    return sorted({*first, *compared}) if compared and len(first) < count else first


def _texts(job: Job) -> list[data.Row]:
    """The public texts, as rows without an answer."""
    if job.texts is None or job.fleet.public is None:
        return []
    lines = Path(job.texts).read_text(encoding="utf-8").split("\n")
    texts: list[data.Row] = [json.loads(line) for line in lines if line]
    if len(texts) < job.fleet.public.texts:
        raise InputError(
            f"the fleet has {job.fleet.public.texts} public texts, but its file has {len(texts)} rows"
        )
    return texts[: job.fleet.public.texts]


def _public(
    job: Job, texts: list[data.Row], labels: list[str], met: set[str], how: Tokenization
) -> Completions | Predictions | None:
    spec = job.fleet.codistill
    if not texts or spec is None:
        return None
    if job.fleet.head is None:
        return Completions(job, spec, texts, how)
    return Predictions(job, texts, labels, met, how) if labels else None


def _in_frame(how: Tokenization, texts: list[data.Row]) -> list[Example]:
    """Examples of the public texts, tokenized as the rows of a head are."""
    return how._replace(labels={}).examples({**row, "label": ""} for row in texts)


def _result(
    job: Job, material: Material, scores: dict[str, Score], trained: Trained, sent: Sent, meter: Meter
) -> Result:
    training = job.fleet.training
    return Result(
        samples=min(len(material.examples), training.steps * training.rows_a_step),
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
        empty=material.empty,
    )
