"""What the trainer process does: one job, or the measurement of its own baseline."""

import errno
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from edge_broker import files
from edge_kernels import apply
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.adapters.export import peft as export
from edge_runtime.errors import DiskError, EdgeError, InputError, MemoryShortError
from edge_runtime.methods import fedit
from edge_runtime.methods.interface import WIDTHS, Method
from edge_runtime.models import weights
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers, nested_blocks
from edge_runtime.models.tokenizer import load as load_tokenizer
from edge_runtime.planning.predict import loss_chunk_bytes
from edge_runtime.planning.search import lower
from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.completion import Completion
from edge_runtime.protocol.keys import LABEL, kind_of, label_of, leading
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Easing, Result
from edge_runtime.trainer import data, greedy, public, step
from edge_runtime.trainer.cap import cap_gpu
from edge_runtime.trainer.evaluate import evaluate
from edge_runtime.trainer.job import Job, Progress
from edge_runtime.trainer.lean import lean_imports
from edge_runtime.trainer.limit import Limit
from edge_runtime.trainer.meter import Meter, release

START = "start.bin"  # the exchanged factors as the round found them; in memory they would be one adapter more
DISK_WAIT_S, DISK_POLL_S = 600.0, 5.0


class Bases:
    """Where a job gets tokenizer and frozen base model from: its files."""

    def tokenizer(self, facts: Facts) -> Any:
        return load_tokenizer(Path(facts.folder))

    def model(self, facts: Facts, plan: Plan, device: str) -> PreTrainedModel:
        return weights.load(facts, plan.depth, plan.weights, device, streamed=plan.streamed)


def run(folder: Path, bases: Bases, say: Callable[[Progress], None]) -> None:
    """Do the job of a folder.

    Raises:
        InputError: the data, the model or the starting state is not what it has to be.
        TrainerError: training went wrong.
    """
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    method = methods.build(job.fleet.method, job.fleet.head, job.fleet.codistill)
    if job.machine.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this device has a GPU, but the installed torch cannot use it: install its CUDA build, or use --device cpu"
        )
    if job.machine.gpu_cap_bytes is not None:
        cap_gpu(job.machine.gpu_cap_bytes)
    meter = Meter(job.machine.device)
    if job.machine.threads:
        torch.set_num_threads(job.machine.threads)

    def tell(phase: str, done: int = 0, of: int = 0, loss: float | None = None) -> None:
        say(Progress(phase, done, of, loss, meter.current_bytes()))

    tell("load")
    with meter.phase("load"):
        rows = data.read_rows(Path(job.data))
        labels = _labels(job, rows)
        tokenizer = bases.tokenizer(job.facts)
        read = partial(data.tokenize, tokenizer=tokenizer, max_tokens=job.plan.tokens, labels=labels or None)
        examples = read(rows) if job.train else []
        held_out = {name: read(data.read_rows(Path(path))) for name, path in job.evaluation.items()}
        texts, stops = public.texts(job), public.ends(tokenizer)
        anchors = public.numbered(texts, read) if labels else []
        prompts = public.prompts(job, texts, tokenizer) if job.fleet.head is None else {}
        distillation = public.completed(job, texts, prompts, read) if prompts else None
        del tokenizer, read
        release()
        plan = job.plan
        with lean_imports():  # the code of the model's family
            model = bases.model(job.facts, plan, job.machine.device)
        kept = kept_layers(plan.depth, job.facts.layers)
        adapter = attach.attach(
            model,
            kept,
            job.fleet.adapter.at(plan.rank),
            method,
            job.fleet.seed,
            whole=job.facts.layers,
            fleet_rank=job.fleet.adapter.rank,
            labels=tuple(labels),
        )
        undo = apply(model, plan.mlp_tokens)
        shared = codec.decode(Path(job.start).read_bytes()) if job.start is not None else {}
        start = _start(job, method, attach.state(adapter), shared)
        attach.load_state(adapter, start)
        taught = own = data.labels_of(rows)
        if anchors:
            distillation = public.predicted(job, anchors, labels, own, shared)
            taught = own if distillation is None else set(labels)
        del shared
        if job.train:
            _put_aside(start, method, folder, tell)
        release()
    scores = {}
    with meter.phase("evaluate"):
        for name, examples_held in held_out.items():
            tell(f"evaluate {name}")
            scores[name] = evaluate(model, adapter, examples_held, job.plan.rows)
    losses: list[float] = []
    ends: list[float] = []
    payload, rank = b"", None

    def stepped(done: int, loss: float | None) -> None:
        ends.append(time.monotonic())
        tell("train", done, job.fleet.training.steps, loss)

    easings: list[Easing] = []
    micro_rows = plan.rows
    limit = _limit(job, method, meter)

    def ease() -> Plan | None:
        nonlocal undo, micro_rows
        way = limit.ease() if limit is not None else None
        if way is not None:
            undo()
            undo = apply(model, way.mlp_tokens)
            easings.append(Easing(way.rows, way.boundaries, way.mlp_tokens, way.kept_blocks))
            micro_rows = way.rows
            release()
            if meter.cuda:
                torch.cuda.empty_cache()  # else what was reserved counts as what comes
            meter.lap()  # what comes is measured without what was
        return way

    if job.train:
        depths = job.depths if method.exchanges_layers else (job.plan.depth,)
        ends.append(time.monotonic())
        with meter.phase("train"):
            losses = step.train(
                model,
                adapter,
                examples,
                job.fleet.training,
                slices=nested_blocks(depths, job.plan.depth, job.facts.layers),
                micro_rows=job.plan.rows,
                round_=job.round,
                rounds=job.fleet.rounds,
                seed=job.fleet.seed,
                progress=stepped,
                ease=ease,
                keep=job.plan.boundaries,
                kept_blocks=job.plan.kept_blocks,
                loss_chunk_bytes=loss_chunk_bytes(job.plan),
                distillation=distillation,
                passes=method.passes(job.round),
            )
        said: attach.State = {}
        written: list[greedy.Written] = []
        heard = job.round < job.fleet.rounds  # nobody will learn from what is said in the last round
        if anchors and heard:
            tell("predict")
            with meter.phase("predict"):
                said = public.predict(model, adapter, labels, examples, anchors, micro_rows)
        if prompts and stops and heard:
            with meter.phase("complete"):
                progress = partial(tell, "complete prompts", of=len(prompts))
                written = public.complete(model, job, examples, prompts, stops, micro_rows, progress)
        attach.detach(model)
        del model, undo
        gc.collect()  # its modules and their functions refer to each other
        release()
        tell("encode")
        with meter.phase("encode"):
            completions = public.as_text(written, prompts, bases.tokenizer(job.facts)) if written else []
            payload, rank = _write(folder, job, method, adapter, taught, said, completions, tell)
    else:
        attach.detach(model)
        if job.export is not None:
            export.to_peft(
                start, job.facts, job.fleet.adapter.at(job.plan.rank), method, adapter.paths, Path(job.export)
            )
    result = Result(
        samples=min(len(examples), job.fleet.training.steps * job.fleet.training.rows_a_step),
        evaluation=scores,
        losses=[loss for loss in losses if math.isfinite(loss)],
        skipped=sum(map(math.isnan, losses)),
        easings=easings,
        step_seconds=[end - begin for begin, end in pairwise(ends)],
        phases=meter.phases,
        seconds=meter.seconds,
        measured_peak_bytes=meter.peak_bytes,
        payload_bytes=len(payload),
        rank=rank,
    )
    _replace(folder / "result.json", msgspec.json.encode(result), tell)
    tell("done")


def _limit(job: Job, method: Method, meter: Meter) -> Limit | None:
    if job.machine.budget_bytes is None:
        return None
    rows = settings.rows_of_a_step(job.fleet.training, job.fleet.codistill)
    now, *ways = lower(job.facts, job.plan, method=method, roles=job.fleet.adapter.roles, rows_a_step=rows)
    return Limit(job.machine.budget_bytes, now, ways, meter.lap)


def _labels(job: Job, rows: list[data.Row]) -> list[str]:
    """What the head tells apart, if there is one: the labels of this device's rows, and those that reached it through the
    fleet's version."""
    if job.fleet.head is None:
        return []
    keys = codec.shapes(Path(job.start).read_bytes()) if job.start is not None else {}
    met = {label_of(key) for key in keys if kind_of(key) in ("labels", "anchors")}
    for label in data.labels_of(rows):
        if not LABEL.fullmatch(label):
            raise InputError(
                f"a label of {len(label)} characters has to be 1 to 80 characters without line breaks or tabs, as a "
                "head over labels is exchanged by their names"
            )
    return sorted(data.labels_of(rows) | met)


def _start(job: Job, method: Method, initial: attach.State, shared: attach.State) -> attach.State:
    """The state a round starts from: version 0, then what the fleet shares, then what is private."""
    state = dict(initial)
    shapes = {key: value.shape for key, value in state.items()}
    for key, value in shared.items():
        if key in state:
            state[key] = value[leading(shapes[key])] if method.unequal else value
    if job.carried.private is not None:
        _overlay(state, _load(job.carried.private), method, np.copyto)
    attach.check_keys(state, shapes)
    return state


def _overlay(state: attach.State, kept: attach.State, method: Method, put: Callable[..., object]) -> None:
    """Put what is kept of an earlier round where the state has it: a plan since then may have other layers or another rank,
    and what is of layers of another width belongs to another model."""
    for key in kept.keys() & state.keys():
        factor = method.factor(key)
        if all(
            axis not in WIDTHS or mine == theirs
            for axis, mine, theirs in zip(factor.axes, state[key].shape, kept[key].shape, strict=True)
        ):
            both = leading(tuple(map(min, state[key].shape, kept[key].shape)))
            put(state[key][both], kept[key][both])


def _put_aside(start: attach.State, method: Method, folder: Path, tell: Callable[[str], None]) -> None:
    """Move what the delta will be counted from to a file; what stays private is not needed again."""
    exchanged = {key: value for key, value in start.items() if method.factor(key).exchanged}
    if exchanged:
        _save(folder / START, exchanged, tell)
    start.clear()


def _write(
    folder: Path,
    job: Job,
    method: Method,
    adapter: attach.Adapter,
    taught: set[str],
    said: attach.State,
    completions: list[Completion],
    tell: Callable[[str], None],
) -> tuple[bytes, int | None]:
    """Write what the round made: payload and residual of the exchanged factors, the state of the private ones. Gives the
    payload, and the rank in which the device goes on if its method prunes.

    taught: the labels that this device was shown; of others the head's rows do not travel.
    said, completions: what goes with the delta as it is; nothing is owed of it.

    The factors themselves become delta and then residual: whatever is of their size exists once.
    """
    trained = {key: factor.detach().float().cpu().numpy() for key, factor in adapter.rows()}
    private = {key: value for key, value in trained.items() if method.factor(key).private}
    delta = {
        key: value
        for key, value in trained.items()
        if method.factor(key).exchanged and (kind_of(key) != "labels" or label_of(key) in taught)
    }
    if private:
        _save(folder / "state.bin", private, tell)
    rank = None
    if not method.exchanges:
        return b"", rank
    if delta:
        with safe_open(folder / START, framework="np") as start:
            rank = method.next_rank(delta, start.get_tensor)
            for key, value in delta.items():
                value -= start.get_tensor(key)
                if rank is not None:
                    sizes = zip(method.factor(key).axes, value.shape, strict=True)
                    cut = leading([rank if axis == "rank" else size for axis, size in sizes])
                    delta[key] = np.ascontiguousarray(value[cut])
        (folder / START).unlink()
    for owed, read in (
        (job.carried.residual, _load),
        (job.carried.unsent, lambda path: codec.decode(Path(path).read_bytes())),
    ):
        if owed is not None:
            still = {
                key: value
                for key, value in read(owed).items()
                if not (method.refactored and kind_of(key) == "layers")
            }
            _overlay(delta, still, method, lambda into, value: np.add(into, value, out=into))
    payload = codec.encode({**delta, **said}, completion.encode(completions))
    sent = codec.decode(payload)
    for key, value in delta.items():
        value -= sent.pop(key)
    _save(folder / "residual.bin", delta, tell)
    _replace(folder / "payload.bin", payload, tell)
    return payload, rank


def _load(path: str) -> attach.State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}, which an earlier round left, cannot be read: {error}; start with a new --state"
        ) from error


def _save(path: Path, tensors: Mapping[str, NDArray[np.float32]], tell: Callable[[str], None]) -> None:
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    _when_there_is_room(lambda fresh: save_file(contiguous, fresh), path, tell)


def _replace(path: Path, content: bytes, tell: Callable[[str], None]) -> None:
    _when_there_is_room(lambda fresh: fresh.write_bytes(content), path, tell)


def _when_there_is_room(write: Callable[[Path], object], path: Path, tell: Callable[[str], None]) -> None:
    """Write a file whole or not at all. A full disk is waited for: what a round has learned is worth it.

    Raises:
        DiskError: it stayed full for DISK_WAIT_S.
    """
    fresh, until = path.with_suffix(".part"), time.monotonic() + DISK_WAIT_S
    while True:
        try:
            write(fresh)
            files.put(fresh, path)
            return
        except (OSError, SafetensorError) as error:  # safetensors has system errors as text alone
            fresh.unlink(missing_ok=True)
            if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
                raise
            if time.monotonic() > until:
                raise DiskError(
                    f"{path.parent} is on a disk that has been full for {DISK_WAIT_S:.0f} s"
                ) from error
            tell("wait for disk space")
            time.sleep(DISK_POLL_S)


def baseline_bytes() -> int:
    """Peak resident bytes of a trainer whose model is negligible: libraries, and the code that a step is the first to touch."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    meter = Meter("cpu")
    with meter.phase("train"):
        for dtype in (torch.float32, torch.bfloat16):
            model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
            adapter = attach.attach(model, (0,), settings.Adapter(), fedit.METHOD, seed=0)
            apply(model)
            example = data.Example([1] * 16, [1] * 16)
            training = settings.Training(steps=1, rows_a_step=1)
            step.train(
                model,
                adapter,
                [example],
                training,
                slices=[(0,)],
                micro_rows=1,
                round_=1,
                rounds=1,
                seed=0,
                progress=lambda *_: None,
            )
            evaluate(model, adapter, [example], 1)
    return meter.peak_bytes


def main() -> int:
    """Run the job named on the command line; one sentence on stderr and an exit code where it fails."""
    if sys.argv[1:] == ["--baseline"]:
        sys.stdout.write(f"{baseline_bytes()}\n")
        return 0
    if "--attended" in sys.argv[2:]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        run(Path(sys.argv[1]), Bases(), _say)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except (torch.OutOfMemoryError, MemoryError) as error:
        sys.stderr.write(f"{MemoryShortError(f'out of memory: {str(error).partition(chr(10))[0]}')}\n")
        return MemoryShortError.exit_code
    except OSError as error:
        sys.stderr.write(f"{InputError(f'cannot read or write what the round needs: {error}')}\n")
        return InputError.exit_code
    return 0


def _say(progress: Progress) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(progress) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_stdin() -> None:
    os.read(0, 1)  # unbuffered: a lock of sys.stdin held here would stand in the way of a normal exit
    os._exit(1)
