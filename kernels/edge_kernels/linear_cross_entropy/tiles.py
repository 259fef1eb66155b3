"""The loss in tiles of tokens by vocabulary, in Triton: the logits of a chunk do not exist either.

The forward pass leaves one log-sum-exp a token. Backward makes each tile of logits again and skips
the tiles whose gradient is below the dtype's resolution: three products a token, less what is
skipped. dh is a sum of atomic additions, so its last bits differ from run to run. Kept for
backward: h, and one float32 a token.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from edge_kernels.backend import Launch, blank, jit, tl, triton
from edge_kernels.linear_cross_entropy.chunks import cap
from edge_kernels.linear_cross_entropy.head import LanguageHead
from edge_kernels.quant import BLOCK, Packed
from edge_kernels.tiles import blank_packed, expand_tile, pointers


def losses(rows, head, batch, chunk_bytes, _trains):  # type: ignore[no-untyped-def]
    """The loss and the log-sum-exp of each labelled token."""
    log_sum, label_logits = (torch.empty(len(batch.targets), device=rows.device) for _ in range(2))
    for group, x in batch.chunks(rows, _tokens_a_group(rows, head.weight, chunk_bytes)):
        log_sum[group], label_logits[group] = _log_sum(x, head, batch.targets[group])
    return log_sum - label_logits, log_sum


def gradient(rows, log_sum, head, batch, chunk_bytes, share):  # type: ignore[no-untyped-def]
    """share times the gradient of the rows, zero where they have no label."""
    drows = torch.empty_like(rows) if batch.places is None else torch.zeros_like(rows)
    for group, x in batch.chunks(rows, _tokens_a_group(rows, head.weight, chunk_bytes)):
        dh = torch.zeros(x.shape, device=x.device)
        _dhidden(dh, x, head, batch.targets[group], log_sum[group])
        places = group if batch.places is None else batch.places[group]
        drows[places] = dh.mul_(share).to(rows.dtype)
    return drows


def _tokens_a_group(rows: torch.Tensor, weight: torch.Tensor | Packed, chunk_bytes: int) -> int:
    """Tokens whose float32 gradient, and the log-sum-exps of their tiles, fit the budget."""
    return max(chunk_bytes // (4 * max(rows.shape[1], weight.shape[0] // 32)), 16)


def _log_sum(x, head, targets):  # type: ignore[no-untyped-def]
    """The log-sum-exp and the label's logit of each token of x (tokens, width)."""
    pieces = triton.cdiv(head.weight.shape[0], _tile(len(x), head)["V"])
    log_sums = x.new_empty(pieces, len(x), dtype=torch.float32)
    label_logits = torch.empty(len(x), device=x.device)
    _launch(x, head, targets, log_sums, label_logits, back=False)
    return log_sums.logsumexp(0), label_logits


def _dhidden(dh, x, head, targets, log_sum):  # type: ignore[no-untyped-def]
    """Add dl W of each token to dh (tokens, width), float32."""
    _launch(x, head, targets, log_sum, dh, back=True)


def _launch(x, head, targets, log_sums, result, back):  # type: ignore[no-untyped-def]
    (tokens, width), vocabulary = x.shape, head.weight.shape[0]
    tile = _tile(tokens, head)
    bias = x if head.bias is None else head.bias.contiguous()
    grid = (triton.cdiv(tokens, tile["M"]) * triton.cdiv(vocabulary, tile["V"]),)
    _kernel[grid](
        *(x.contiguous(), *pointers(head.weight), bias, targets, log_sums, result),
        *(tokens, vocabulary, width, head.softcap or 1.0, torch.finfo(x.dtype).eps / 32),
        BACK=back,
        **tile,
    )


def _tile(tokens: int, head: LanguageHead) -> dict[str, Any]:
    """Launch options: M tokens by V logits, K of the width at a time.

    At most 72 KiB of shared memory, which every architecture has. A tile of a packed head needs
    registers to be expanded in.
    """
    format = head.weight.format if isinstance(head.weight, Packed) else "dense"
    return {
        "BIASED": head.bias is not None,
        "CAPPED": head.softcap is not None,
        "FORMAT": format,
        "M": 16 if tokens <= 16 else 64,
        "V": 128 if format == "dense" else 64,
        "K": 64,
        "num_warps": 4 if format == "dense" or tokens <= 16 else 8,
        "num_stages": 3 if format == "dense" else 4,
    }


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    quants_ptr,
    scales_ptr,
    mins_ptr,
    groups_ptr,
    offset_ptr,
    tables_ptr,
    bias_ptr,
    targets_ptr,
    log_sums_ptr,
    result_ptr,
    tokens,
    vocabulary,
    width,
    softcap,
    resolution,
    BACK: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    FORMAT: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
):
    """Forward: store the tile's log-sum-exps, and in result the logits of the labels in the tile.

    Back: log_sums are those of whole tokens. Add dl W of the tile to result, which is dh, unless
    dl is below `resolution` for every token.
    """
    parts = quants_ptr, scales_ptr, mins_ptr, groups_ptr, offset_ptr, tables_ptr
    blocks = tl.cdiv(tokens, M)
    piece = tl.program_id(0) // blocks  # neighbours read the same piece of the head
    row = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    column = piece * V + tl.arange(0, V)
    # rows beyond the last token repeat it, and columns beyond the vocabulary its last one
    x_row = tl.minimum(row, tokens - 1).to(tl.int64) * width
    head_row = tl.minimum(column, vocabulary - 1).to(tl.int64)
    logits = tl.zeros((M, V), tl.float32)
    if BIASED:  # before the products: behind them it would take registers of its own
        logits += tl.load(bias_ptr + head_row).to(tl.float32)[None, :]
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        x = tl.load(x_ptr + x_row[:, None] + k[None, :], mask=k[None, :] < width, other=0.0)
        weight = expand_tile(parts, head_row, first, width, FORMAT, V, K)
        logits = tl.dot(x, weight.to(x.dtype).T, logits, input_precision="ieee")
    if CAPPED:
        logits = cap(logits, softcap)

    inside, within = row < tokens, column[None, :] < vocabulary
    target = tl.load(targets_ptr + row, mask=inside, other=-1)
    if BACK:
        log_sum = tl.load(log_sums_ptr + row, mask=inside, other=float("inf"))
        dl = tl.where(within, tl.exp(logits - log_sum[:, None]), 0.0)
        # in float32: the gradient of a sure token is a small difference
        dl -= (column[None, :] == target[:, None]).to(tl.float32)
        if tl.max(tl.sum(tl.abs(dl), axis=1), axis=0) >= resolution:
            slope = 1 - (logits / softcap) * (logits / softcap) if CAPPED else 1.0
            rounded = (dl * slope).to(x_ptr.dtype.element_ty)
            for first in range(0, width, K):
                k = first + tl.arange(0, K)
                weight = expand_tile(parts, head_row, first, width, FORMAT, V, K).to(rounded.dtype)
                part = tl.dot(rounded, weight, input_precision="ieee")
                at = result_ptr + row.to(tl.int64)[:, None] * width + k[None, :]
                tl.atomic_add(at, part, mask=inside[:, None] & (k[None, :] < width), sem="relaxed")
    else:
        logits = tl.where(within, logits, float("-inf"))
        peak = tl.max(logits, axis=1)
        log_sum = peak + tl.log(tl.sum(tl.exp(logits - peak[:, None]), axis=1))
        tl.store(log_sums_ptr + piece.to(tl.int64) * tokens + row, log_sum, mask=inside)
        label_logit = tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), axis=1)
        in_tile = (target >= piece * V) & (target < piece * V + V)
        tl.store(result_ptr + row, label_logit, mask=inside & in_tile)


def ahead_of_time() -> Iterator[Launch]:
    """Every tile and format in 16 bits, with a bias and a softcap, which only add to them."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for (name, dtype), format, tokens in product(dtypes.items(), ("dense", *BLOCK), (5, 17)):
        weight = blank(dtype, 1000, 1024) if format == "dense" else blank_packed(format, 1000, 1024)
        head = LanguageHead(weight, blank(dtype, 1000), 30.0)
        x, targets = blank(dtype, tokens, 1024), blank(torch.int64, tokens)
        log_sum, dh = blank(torch.float32, tokens), blank(torch.float32, tokens, 1024)
        end = f"{format} M={_tile(tokens, head)['M']}"
        forward, backward = (x, head, targets), (dh, x, head, targets, log_sum)
        yield Launch(f"linear_cross_entropy {name} log_sum {end}", _log_sum, forward, streamed=True)
        yield Launch(f"linear_cross_entropy {name} dhidden {end}", _dhidden, backward, streamed=True)
