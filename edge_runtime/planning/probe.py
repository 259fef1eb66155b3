"""Measures a device's rates in a process of its own, since it needs torch (processes.rates).

python -m edge_runtime.planning.probe DEVICE THREADS   prints Rates as JSON, after about two seconds

0 threads: torch's default.
"""

import sys
import time
from collections.abc import Callable

import msgspec
import torch

from edge_runtime.planning.time import Rates

ROWS, INTO, OUT = 512, 576, 1536  # an MLP's matrix of a small model, and a micro-batch
COPIED_BYTES = 64 << 20  # well above the caches
EACH_S, AT_LEAST = 0.6, 5


def main() -> None:
    """Print the rates of the device that the command line names."""
    device, threads = sys.argv[1], int(sys.argv[2])
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "the installed torch cannot use this device's GPU: install its CUDA build, or use --device cpu"
        )
    if threads:
        torch.set_num_threads(threads)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source), device)
    rates = Rates(
        bfloat16_flops=_products(torch.bfloat16, device),
        float32_flops=_products(torch.float32, device),
        copy_bytes=2 * COPIED_BYTES / copied,
    )
    sys.stdout.write(msgspec.json.encode(rates).decode())


def _products(dtype: torch.dtype, device: str) -> float:
    x = torch.ones(ROWS, INTO, dtype=dtype, device=device)
    weight = torch.ones(OUT, INTO, dtype=dtype, device=device)
    return 2 * ROWS * INTO * OUT / _seconds(lambda: x @ weight.T, device)


def _seconds(work: Callable[[], object], device: str) -> float:
    """The fastest of repeats; a GPU is waited for each time.

    Their median would keep what else the machine did: beside another process two threads were three
    times slower.
    """
    taken: list[float] = []
    until = time.perf_counter() + EACH_S
    while len(taken) < AT_LEAST or time.perf_counter() < until:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    main()
