"""The loss in chunks of tokens, in Triton: the logits become their own gradient in place.

The products are the library's. A kernel turns the logits of a chunk, which fit the byte budget,
into their gradient. There are two products a token, and each reads the head once a chunk. Kept for
backward: dh.
"""

from collections.abc import Iterator
from typing import Any

import torch

from edge_kernels.backend import DTYPES, Launch, blank, jit, tl
from edge_kernels.quant import Packed, expanded_rows

LAUNCH: dict[str, Any] = {"BLOCK": 4096, "num_warps": 8}


def losses(rows, head, batch, chunk_bytes, trains):  # type: ignore[no-untyped-def]
    """The loss of each labelled token, and dh of all, or None where h does not train."""
    tokens, vocabulary = len(batch.targets), head.weight.shape[0]
    step = min(tokens_a_chunk(rows, vocabulary, chunk_bytes), tokens)
    dh = rows.new_empty(tokens, rows.shape[1]) if trains else None
    result = torch.empty(tokens, device=rows.device)
    buffer = rows.new_empty(step, vocabulary)
    for chunk, x in batch.chunks(rows, step):
        logits = buffer[: len(x)]
        for columns, weight in expanded_rows(head.weight, rows.dtype):
            head.product(x, columns, weight, out=logits[:, columns])
        _gradient(logits, batch.targets[chunk], result[chunk], head.softcap, trains)
        if dh is not None:
            _product(logits, head.weight, out=dh[chunk])
    return result, dh


def tokens_a_chunk(rows: torch.Tensor, vocabulary: int, chunk_bytes: int) -> int:
    """Tokens whose logits fit the budget; a multiple of 8, which fills a product's registers."""
    tokens = max(chunk_bytes // (rows.element_size() * vocabulary), 1)
    return tokens - tokens % 8 if tokens > 8 else tokens


def _product(dl: torch.Tensor, matrix: torch.Tensor | Packed, out: torch.Tensor) -> None:
    """out = dl W; the pieces of a packed head add up in float32."""
    if isinstance(matrix, torch.Tensor):
        torch.mm(dl, matrix, out=out)
        return
    total = torch.zeros(out.shape, device=out.device)
    for columns, weight in expanded_rows(matrix, dl.dtype):
        total += dl[:, columns] @ weight
    out.copy_(total)


def _gradient(logits, targets, losses, softcap, trains):  # type: ignore[no-untyped-def]
    """Write each token's loss and, where h trains, overwrite its logits with their gradient."""
    tokens, vocabulary = logits.shape
    arguments = (logits, targets, losses, vocabulary, softcap or 1.0)
    _gradient_kernel[(tokens,)](*arguments, CAPPED=softcap is not None, TRAINS=trains, **LAUNCH)


@jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    targets_ptr,
    losses_ptr,
    vocabulary,
    softcap,
    CAPPED: tl.constexpr,
    TRAINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: first its loss, then the gradient of its logits."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocabulary
    target = tl.load(targets_ptr + row)
    label_logit = tl.load(logits_ptr + target).to(tl.float32)
    if CAPPED:
        label_logit = cap(label_logit, softcap)
    # each lane has its own maximum; finite, so that a lane without logits adds 0
    peak = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        if CAPPED:
            logits = tl.where(columns < vocabulary, cap(logits, softcap), float("-inf"))
        higher = tl.maximum(peak, logits)
        total = total * tl.exp(peak - higher) + tl.exp(logits - higher)
        peak = higher
    highest = tl.max(peak, axis=0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(peak - highest), axis=0))
    tl.store(losses_ptr + row, log_sum - label_logit)
    if TRAINS:
        for first in range(0, vocabulary, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            logits = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            if CAPPED:
                logits = cap(logits, softcap)
            dl = tl.exp(logits - log_sum) - (columns == target).to(tl.float32)
            if CAPPED:
                dl *= 1 - (logits / softcap) * (logits / softcap)
            tl.store(logits_ptr + columns, dl, mask=inside)


@jit
def cap(logits, softcap):  # type: ignore[no-untyped-def]
    """softcap · tanh(logits / softcap); by exp, since the interpreter has no libdevice."""
    return softcap * (1 - 2 / (tl.exp(2 * logits / softcap) + 1))


def ahead_of_time() -> Iterator[Launch]:
    """The kernel with a softcap, which only adds to it."""
    for name, dtype in DTYPES.items():
        arguments = (blank(dtype, 17, 4096), blank(torch.int64, 17), blank(torch.float32, 17), 30.0, True)
        yield Launch(f"linear_cross_entropy {name} gradient", _gradient, arguments)
