"""Runs a study's grid of arms by seeds in a pool of processes; runs that are done stay done.

OUT/runs.jsonl     the results (results.py); a run adds its line when it is over
OUT/work/          files of the runs in progress
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import EdgeError
from edge_runtime.planning import processes
from edge_runtime.simulation import draw, plan, results
from edge_runtime.simulation.results import Outcome, Outcomes
from edge_runtime.simulation.spec import Arm, Spec, slug


class Folders(NamedTuple):
    """Where a study reads and writes."""

    files: Path  # of the data
    models: Path  # that relative paths of models start from
    out: Path  # of the results


def finished(spec: Spec, seeds: Iterable[int], folders: Folders) -> Outcomes:
    """Runs in the folder that this code would repeat alike, by arm and seed in the given order.

    Raises:
        InputError: a data file or a model is not there.
    """
    present, contents = results.read(folders.out), _contents(spec, folders)
    runs = [(arm, seed) for arm in spec.arm for seed in seeds if (arm.name, seed) in present]
    return {
        (arm.name, seed): present[arm.name, seed]
        for arm, seed in runs
        if present[arm.name, seed].digest == spec.digest(arm, seed, contents)
    }


def _contents(spec: Spec, folders: Folders) -> dict[str, str]:
    """Digests of the data files and the models, by their names in the study's file."""
    models = {
        source: processes.prepared(source, folders.models).model_class for source in sorted(spec.sources)
    }
    return draw.contents(spec, folders.files) | models


def run(spec: Spec, folders: Folders, workers: int, tell: Callable[[str], None]) -> list[str]:
    """Make the runs that are missing, seed by seed so that every arm has its first result early.

    Args:
        workers: runs at a time.
        tell: called with a sentence when a run ends.

    Returns:
        Why runs failed, a sentence each. The other runs are done, unless a worker was killed: then
        all runs that were not over have failed.

    Raises:
        InputError: a run could not use the data.
    """
    seeds = spec.study.seeds
    present = finished(spec, seeds, folders)
    missing = plan.missing(spec, present)
    if not missing:
        return []
    # all that the runs will draw, so that nothing starts with data that cannot be used
    for seed in seeds:
        draw.shares(spec, folders.files, seed)
    for name in spec.data:
        draw.test_rows(spec, name, folders.files)
    draw.public_texts(spec, folders.files)
    (folders.out / "work").mkdir(parents=True, exist_ok=True)
    absolute, contents = Folders(*(folder.resolve() for folder in folders)), _contents(spec, folders)
    with _pool(workers) as pool:
        pending = {
            pool.submit(_run, spec, arm, seed, spec.digest(arm, seed, contents), absolute): (arm.name, seed)
            for arm, seed in missing
        }
        return _collect(pending, folders.out, workers, tell)


def _collect(
    runs: dict[Future[Outcome], tuple[str, int]], out: Path, workers: int, tell: Callable[[str], None]
) -> list[str]:
    """Write each result as its run ends; the sentences of those that failed."""
    failed: list[str] = []
    killed = 0
    for ended in as_completed(runs):
        name, seed = runs[ended]
        error = ended.exception()
        if error is None:
            outcome = ended.result()
            results.add(out, outcome)
            tell(f"{name}, seed {seed}: {outcome.accuracy:.1%} after {outcome.seconds:.0f} s of a core")
        elif isinstance(error, BrokenProcessPool):  # every run that has not ended gets this error
            killed += 1
        else:
            reason = str(error) if isinstance(error, EdgeError) else repr(error)
            failed.append(f"{name}, seed {seed}: {reason}")
            tell(f"failed: {failed[-1]}")
    if killed:
        failed.append(
            f"{killed} of {len(runs)} runs: a worker process was killed, most likely for want of memory; "
            f"fewer --workers than {workers} take less"
        )
        tell(f"failed: {failed[-1]}")
    return failed


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes with a trainer's environment; they end when the block is left."""
    before = dict(os.environ)
    os.environ.update(processes.TRAINER_ENVIRONMENT)  # read by a worker as it starts
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        yield pool
    except BaseException:
        # interrupted: shutdown would wait for the runs in progress
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.clear()
        os.environ.update(before)


def _end_with_parent() -> None:
    """End this worker when its study is killed; otherwise it would go on to the end of its run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(spec: Spec, arm: Arm, seed: int, digest: str, folders: Folders) -> Outcome:
    """Make one run in a worker."""
    from edge_runtime.compat.lean_imports import lean_imports

    with lean_imports():
        from edge_runtime.simulation.run import run_arm
    folder = folders.out / "work" / f"{slug(arm.name)}-{seed}"
    return run_arm(spec, arm, seed, digest, files=folders.files, models=folders.models, folder=folder)
