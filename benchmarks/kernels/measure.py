"""Measures a case: time and peak memory of its variants, round by round, beside its floors.

    floors    bytes / measured bandwidth,   FLOPs / measured matrix product rate

In each round every variant runs once, and the next round starts with another one, so that a machine
that slows down slows all alike. On a GPU the cache is overwritten before each run, as the rest of a
model would, and a time is that between two events; it includes waiting for the host, as it does in
training. A CPU's caches stay as they are, since the interpreter lives there too: operands that fit
may beat the floor of their bytes.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases.case import DTYPE, OURS, Case, Variant

ROUNDS, WARM = 5, 2  # least number of timed rounds, and of those before them
BUDGET_S = {"cpu": 1.0, "cuda": 0.3}  # a case; more where the least number of rounds takes more
FLUSH_BYTES = {"cpu": 0, "cuda": 256 << 20}  # larger than a GPU's last cache
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # much larger than the last cache
PRODUCT = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is timed
PEAKS = {
    "cpu": 3,
    "cuda": 1,
}  # runs whose median is the peak: a resident size has noise, an allocator has none
KNOWN_BYTES = 64 << 20  # of the buffer that shows this noise
OUT_OF_MEMORY = "out of memory"
TOLERANCE = 0.05  # relative error between variants: bfloat16 makes a third of it in a layer, a missing factor far more


@dataclass(frozen=True)
class Rates:
    """What the machine does at its best in this run.

    bytes_per_s: read and written by a large copy. flops_per_s: of a large matrix product in the
        cases' dtype.
    peak_noise_bytes: how far the peak of a buffer of 64 MiB measures from its size; None where
        peaks cannot be measured.
    """

    bytes_per_s: float
    flops_per_s: float
    peak_noise_bytes: int | None


@dataclass(frozen=True)
class Measured:
    """One variant of a case: seconds and bytes of a run, forward and backward.

    peak_bytes: highest memory during a run above that at its start; None where it cannot be
        measured.
    held_bytes: weights, factors and state that the variant keeps between runs.
    to_slower_floor, to_faster_floor: median over the two floors; the first is 1 for an ideal
        implementation.
    relative_error: of results and gradients, against the first variant's.
    """

    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    peak_bytes: int | None
    held_bytes: int
    to_slower_floor: float
    to_faster_floor: float
    relative_error: float


@dataclass(frozen=True)
class Result:
    """A case and what became of its variants: each is in `variants` or, in words, in `errors`.

    floor_bytes_s, floor_flops_s: the two floors. ours_to: our median over each other variant's.
    """

    operator: str
    kind: str
    shape: str
    tokens: int
    bytes: int
    flops: int
    floor_bytes_s: float
    floor_flops_s: float
    variants: dict[str, Measured] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    ours_to: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, machine: Rates) -> "Result":
        """What is known before a run."""
        named = (case.operator, case.kind, case.shape.name, case.tokens, case.bytes, case.flops)
        return cls(*named, *floors(case, machine))


def rates(device: torch.device) -> Rates:
    """Measure the machine."""
    one, other = (torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(2 * [PRODUCT[device.type]], device=device, dtype=DTYPE) for _ in range(2))
    copy = min(_seconds(device, lambda: other.copy_(one)) for _ in range(10))
    product = min(_seconds(device, lambda: left @ right) for _ in range(10))
    offs = [
        abs(peak - KNOWN_BYTES)
        for peak in (_peak(device, _known(device)) for _ in range(6))
        if peak is not None
    ]
    return Rates(2 * one.nbytes / copy, 2 * PRODUCT[device.type] ** 3 / product, max(offs[1:], default=None))


def _known(device: torch.device) -> Callable[[], object]:
    return lambda: torch.ones(KNOWN_BYTES, dtype=torch.uint8, device=device)


def floors(case: Case, machine: Rates) -> tuple[float, float]:
    """Seconds that the case's bytes and its FLOPs take at the machine's best."""
    return case.bytes / machine.bytes_per_s, case.flops / machine.flops_per_s


def run(case: Case, device: torch.device, machine: Rates, budget_s: float | None = None) -> Result:
    """Run a case; a variant that fails or computes another result is reported and left out.

    Args:
        budget_s: seconds for the timed rounds, if not the device's own.
    """
    result, times = Result.of(case, machine), floors(case, machine)
    gc.collect()  # an earlier case's cycles; takes too long to be done before each run
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.compiler.reset()  # else the eighth shape of a function would run uncompiled
    try:
        variants = case.prepare(device)
    except Exception as error:
        result.errors["all"] = _in_words(error)
        return result
    apart = _compare(variants, result.errors)
    variants = {name: variants[name] for name in apart}
    seconds = _rounds(variants, device, BUDGET_S[device.type] if budget_s is None else budget_s)
    for name, taken in seconds.items():
        fifths, median = statistics.quantiles(taken, n=5), statistics.median(taken)
        peaks = [_peak(device, variants[name].run, variants[name].before) for _ in range(PEAKS[device.type])]
        known = [peak for peak in peaks if peak is not None]
        result.variants[name] = Measured(
            median,
            fifths[0],
            fifths[-1],
            len(taken),
            int(statistics.median(known)) if known else None,
            variants[name].held_bytes,
            median / max(times),
            median / min(times),
            apart[name],
        )
    if OURS in result.variants:
        ours = result.variants[OURS].median_s
        result.ours_to.update(
            {name: ours / it.median_s for name, it in result.variants.items() if name != OURS}
        )
    return result


def _compare(variants: dict[str, Variant], errors: dict[str, str]) -> dict[str, float]:
    """Run each variant for the first time; the relative errors of those that are right."""
    reference: list[torch.Tensor] | None = None
    apart = {}
    for name, variant in variants.items():
        _release()
        try:
            variant.before()
            outcome = variant.run()
        except Exception as error:
            errors[name] = _in_words(error)
            continue
        reference = outcome if reference is None else reference
        off = max(relative_error(one, two) for one, two in zip(outcome, reference, strict=True))
        if off <= TOLERANCE:
            apart[name] = off
        else:
            errors[name] = (
                f"computes something else: relative error {off:.3f} against {next(iter(apart), name)}"
            )
    return apart


def relative_error(seen: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float32."""
    truth = truth.float()
    return float((seen.float() - truth).norm() / truth.norm().clamp_min(1e-30))


def _in_words(error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    first = text.splitlines()[0][:200] if text else ""
    return f"{type(error).__name__}: {first}"


# --- time


def _rounds(variants: dict[str, Variant], device: torch.device, budget_s: float) -> dict[str, list[float]]:
    """Seconds of each variant's runs."""
    flush = torch.zeros(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
    rounds: list[dict[str, float]] = []
    names = list(variants)
    began = time.perf_counter()
    while len(rounds) < WARM + ROUNDS or time.perf_counter() - began < budget_s:
        rounds.append(_round(variants, names, device, flush))
        names = [*names[1:], *names[:1]]
    return {name: [seconds[name] for seconds in rounds[WARM:]] for name in variants}


def _round(
    variants: dict[str, Variant], names: list[str], device: torch.device, flush: torch.Tensor
) -> dict[str, float]:
    marks = {}
    for name in names:
        variants[name].before()
        flush.zero_()
        begin = _mark(device)
        variants[name].run()
        marks[name] = begin, _mark(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: _between(*pair) for name, pair in marks.items()}


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    begin = _mark(device)
    run()
    end = _mark(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _between(begin, end)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    return float(end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000)


# --- memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _peak(
    device: torch.device, run: Callable[[], object], before: Callable[[], None] = lambda: None
) -> int | None:
    """Highest memory during a run above that at its start, in bytes.

    On a GPU the allocator's count. On a CPU the resident size, whose peak Linux sets back on
    request, after freed heap has gone back to the system; what a run takes from the heap's rest is
    not seen, and counts come in pages.
    """
    before()
    _release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - start)
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    start = _resident_peak()
    run()
    return _resident_peak() - start


def _resident_peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _release() -> None:
    """Give back what is free of the heap and of the allocator's blocks."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
