"""Mean cross-entropy of a linear head, dense or packed, without the logits of the whole batch.

    loss = mean over labelled tokens of  logsumexp(l) - l[label],   l = cap(h Wᵀ + b)  (head.py)
    dh = dl W,   dl = (softmax(l) - 1[label]) · cap'(h Wᵀ + b)

Tokens without a label are left out before the product. The others take one of three paths:

    sweep     torch     pieces of the vocabulary: the head is read, or expanded, once
    chunks    Triton    chunks of tokens, whose logits become their own gradient in place
    tiles     Triton    tiles of tokens by vocabulary: the logits of a chunk do not exist either

A chunk of T tokens does T operations for each byte of a 16-bit head that it reads. Tiles read the
head two or three times, however many tokens there are. So a dense head takes tiles only where the
budget leaves fewer than FEWEST_TOKENS tokens a chunk. A packed head always takes tiles, but in
float32: exact float32 products have no tensor cores, so the library's product is faster than a
kernel. Kept for backward: the gradient of h (sweep, chunks), or h and one float32 a token (tiles).
Source: Milakov & Gimelshein 2018, arXiv 1805.02867 (running softmax); Wijmans et al. 2024, arXiv
2411.09009 (tiles); Hsu et al. 2024, arXiv 2410.10989 (gradient in the forward pass).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from edge_kernels.backend import DTYPES, Launch, on_triton
from edge_kernels.linear_cross_entropy import chunks, sweep, tiles
from edge_kernels.linear_cross_entropy.head import LanguageHead, check_head
from edge_kernels.quant import Packed

IGNORED = -100  # label of a token that does not count
FEWEST_TOKENS = 64  # in smaller chunks two readings of the head cost more than a third product


def linear_cross_entropy(
    hidden: torch.Tensor, head: LanguageHead, labels: torch.Tensor, chunk_bytes: int = 32 << 20
) -> torch.Tensor:
    """The mean loss over the labelled tokens.

    Args:
        hidden: (..., n) last hidden states, already shifted against the labels; float32, float16 or
            bfloat16.
        head: frozen; a dense weight and the bias are of hidden's dtype.
        labels: (...) int64 in 0..vocabulary-1, or IGNORED.
        chunk_bytes: budget of the logits, of hidden's dtype, that exist at a time.

    Returns:
        A float32 scalar; 0 where no token has a label.

    Raises:
        ValueError: shapes or dtypes do not fit together, a label is out of range, or softcap or
            chunk_bytes is not a usable number.
    """
    _check(hidden, labels, chunk_bytes)
    check_head(head, hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if not torch.is_grad_enabled():  # the forward pass would otherwise make the gradient, too
        rows = rows.detach()
    batch = _labelled(labels.reshape(-1), head.weight.shape[0])
    path = _path(rows, head.weight, len(batch.targets), chunk_bytes)
    loss: torch.Tensor = _LinearCrossEntropy.apply(rows, head, batch, chunk_bytes, path)
    return loss


def _check(hidden: torch.Tensor, labels: torch.Tensor, chunk_bytes: int) -> None:
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden has tokens {tuple(hidden.shape[:-1])} but labels have {tuple(labels.shape)}"
        )
    if hidden.dtype not in DTYPES.values():
        raise ValueError(f"hidden is {hidden.dtype} but has to be float32, float16 or bfloat16")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes} but has to be above 0")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} but have to be int64")


class Labelled(NamedTuple):
    """Where the labelled tokens are among the rows of a batch, and their labels."""

    places: torch.Tensor | None  # (tokens,) int64, their rows in order; None: every row has a label
    targets: torch.Tensor  # (tokens,) int64

    def chunks(self, rows: torch.Tensor, step: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The labelled rows (step, n) at a time, each with its place among the labelled tokens."""
        step = max(step, 1)
        for first in range(0, len(self.targets), step):
            chunk = slice(first, min(first + step, len(self.targets)))
            yield chunk, rows[chunk] if self.places is None else rows[self.places[chunk]]


def _labelled(labels: torch.Tensor, vocabulary: int) -> Labelled:
    counted = labels != IGNORED
    wrong = counted & ((labels < 0) | (labels >= vocabulary))
    tokens, faults = torch.stack((counted.sum(), wrong.sum())).tolist()  # the only wait for a GPU
    if faults:
        lowest, highest = torch.stack(labels[counted].aminmax()).tolist()
        raise ValueError(f"labels go from {lowest} to {highest}, the head has {vocabulary} rows")
    if tokens == len(labels):
        return Labelled(None, labels)
    places = torch.argsort(~counted, stable=True)[:tokens]
    return Labelled(places, labels[places])


def _path(rows: torch.Tensor, weight: torch.Tensor | Packed, tokens: int, chunk_bytes: int) -> Any:
    if not on_triton(rows) or not tokens:
        return sweep
    if rows.dtype == torch.float32:
        return chunks
    small = chunks.tokens_a_chunk(rows, weight.shape[0], chunk_bytes) < min(tokens, FEWEST_TOKENS)
    return tiles if isinstance(weight, Packed) or (small and weight.is_contiguous()) else chunks


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, head, batch, chunk_bytes, path):  # type: ignore[no-untyped-def]
        losses, saved = path.losses(rows, head, batch, chunk_bytes, ctx.needs_input_grad[0])
        # saved: the tokens' log-sum-exps on the path of tiles, else dh
        ctx.save_for_backward(*((rows, saved) if path is tiles else (saved,)))
        ctx.path, ctx.options = path, (head, batch, chunk_bytes)
        ctx.shape, ctx.tokens = rows.shape, max(len(batch.targets), 1)
        return losses.sum() / ctx.tokens

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        head, batch, chunk_bytes = ctx.options
        share = dloss / ctx.tokens
        if ctx.path is tiles:
            rows, log_sum = ctx.saved_tensors
            drows = tiles.gradient(rows, log_sum, head, batch, chunk_bytes, share)
        else:
            (dh,) = ctx.saved_tensors
            # the product is made in float32: a share of 1 / tokens is not a normal number in float16
            drows = torch.mul(dh, share.view(1), out=torch.empty_like(dh))
            if batch.places is not None:
                drows = dh.new_zeros(ctx.shape).index_copy_(0, batch.places, drows)
        return drows, None, None, None, None


def ahead_of_time() -> Iterator[Launch]:
    """The kernels of both Triton paths."""
    yield from chunks.ahead_of_time()
    yield from tiles.ahead_of_time()
