"""Three kernels that `check` has to refuse, and one that it has to pass."""

from edge_kernels.backend import Launch, jit, tl


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


def ahead_of_time(capability: int) -> list[Launch]:
    """The good one first."""
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "n": "i32"}
    small, large = {"M": 64, "K": 64}, {"M": 128, "K": 128}
    return [
        Launch("good", product, signature, small, divisible=("n",), streamed=True),
        Launch("too many registers", product, signature, large, num_warps=2, divisible=("n",)),
        Launch(
            "too much shared memory", product, signature, large, num_warps=8, num_stages=5, divisible=("n",)
        ),
        Launch("single loads", product, signature, small, streamed=True),
    ]
