"""Runs a study's grid in a pool of processes, run by run; what is done already stays done.

OUT/runs/<arm>-<seed>.json     one Outcome, written when its run is over
OUT/work/                      what runs write while they go on
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from edge_broker.files import put

from edge_runtime.errors import EdgeError
from edge_runtime.planning import processes
from edge_runtime.simulation.spec import Arm, Spec, check_files, slug

if TYPE_CHECKING:
    from edge_runtime.simulation.run import KeptBases, Outcome

_bases: list["KeptBases"] = []  # of this process


def kept(spec: Spec, out: Path) -> dict[tuple[str, int], "Outcome"]:
    """The runs that are done, of those that the file has."""
    from edge_runtime.simulation.run import Outcome

    found = {}
    for arm in spec.arm:
        for seed in spec.study.seeds:
            path = _path(out, arm, seed)
            if path.exists():
                outcome = msgspec.json.decode(path.read_bytes(), type=Outcome)
                if outcome.digest == spec.digest(arm, seed):
                    found[arm.name, seed] = outcome
    return found


def run(
    spec: Spec, files: Path, models: Path, out: Path, workers: int, tell: Callable[[str], None]
) -> list[str]:
    """Do the runs that are missing, seed by seed so that every arm has its first result early.

    Returns:
        Why runs failed, a sentence each; the others are done all the same, unless a worker was killed: that ends all that
        are not done.

    Raises:
        InputError: data that runs could not use.
    """
    done = kept(spec, out)
    missing = [(arm, seed) for seed in spec.study.seeds for arm in spec.arm if (arm.name, seed) not in done]
    if not missing:
        return []
    check_files(spec, files)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    lost = 0
    before = dict(os.environ)
    os.environ.update(processes.TRAINER_ENVIRONMENT)  # a worker reads it as it starts
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        runs = {
            pool.submit(_run, spec, arm, seed, files.resolve(), models.resolve(), out.resolve()): (
                arm.name,
                seed,
            )
            for arm, seed in missing
        }
        for ended in as_completed(runs):
            name, seed = runs[ended]
            error = ended.exception()
            if isinstance(error, BrokenProcessPool):  # of every run that has not ended
                lost += 1
                continue
            if error is not None:
                failed.append(
                    f"{name}, seed {seed}: {error if isinstance(error, EdgeError) else repr(error)}"
                )
                tell(f"failed: {failed[-1]}")
                continue
            accuracy, seconds = ended.result()
            tell(f"{name}, seed {seed}: {accuracy:.1%} after {seconds:.0f} s")
    except BaseException:  # stopped: runs that go on are given up, or the end would wait for theirs
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.clear()
        os.environ.update(before)
    if lost:
        failed.append(
            f"{lost} of {len(missing)} runs: a worker process was killed, most likely for want of memory; "
            f"fewer --workers than {workers} take less"
        )
        tell(f"failed: {failed[-1]}")
    return failed


def _end_with_parent() -> None:
    """Let a worker end when its study was killed; it would go on for the whole of its run else."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(spec: Spec, arm: Arm, seed: int, files: Path, models: Path, out: Path) -> tuple[float, float]:
    """One run in a worker: its accuracy and seconds."""
    from edge_runtime.trainer.lean import lean_imports

    with lean_imports():
        from edge_runtime.simulation.run import KeptBases, run_arm
    if not _bases:
        _bases.append(KeptBases())
    path = _path(out, arm, seed)
    outcome = run_arm(spec, arm, seed, files, models, out / "work" / path.stem, _bases[0])
    fresh = path.with_suffix(".part")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    put(fresh, path)
    return outcome.accuracy, outcome.seconds


def _path(out: Path, arm: Arm, seed: int) -> Path:
    return out / "runs" / f"{slug(arm.name)}-{seed}.json"
