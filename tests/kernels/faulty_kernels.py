"""Three kernels that `check` has to refuse, and one that it has to pass."""

from functools import partial

import torch
from edge_kernels.backend import Launch, blank, jit, tl


@jit
def product(a_ptr, b_ptr, c_ptr, n, M: tl.constexpr, K: tl.constexpr):
    """One tile of a Bᵀ, all of it held at once."""
    row, k = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for first in range(0, n, K):
        a = tl.load(a_ptr + row[:, None] * n + first + k[None, :])
        b = tl.load(b_ptr + row[:, None] * n + first + k[None, :])
        total = tl.dot(a, b.T, total)
    tl.store(c_ptr + row[:, None] * M + row[None, :], total)


def launch(n, **options):
    a, c = blank(torch.bfloat16, options["M"], n), blank(torch.float32, options["M"], options["M"])
    product[(1,)](a, a, c, n, **options)


def ahead_of_time() -> list[Launch]:
    """The good one first."""
    small, large = partial(launch, M=64, K=64), partial(launch, M=128, K=128)
    return [
        Launch("good", small, (4096,), streamed=True),
        Launch("too many registers", partial(large, num_warps=2), (4096,)),
        Launch("too much shared memory", partial(large, num_warps=8, num_stages=5), (4096,)),
        Launch("single loads", small, (4097,), streamed=True),
    ]
