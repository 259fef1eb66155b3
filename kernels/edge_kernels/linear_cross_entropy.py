"""Mean cross-entropy of a linear head, dense or packed, without the logits of the whole batch.

    loss = mean over kept tokens of  logsumexp(l) - l[label],   l = cap(h Wᵀ + scale · ((h Aᵀ) Cᵀ) Bᵀ)
    cap(u) = softcap · tanh(u / softcap) or u;   dl = (softmax(l) - 1[label]) · cap'(u);   dh = dl W + scale · ((dl B) C) A

Tokens whose label is ignored are left out before the product. The rest take one of three ways.

A sweep over the vocabulary, in torch: logits of a piece of it, whose softmax without the label goes through the second
product at once and joins a running mean of the head's rows, so that the head is read, or expanded, once for as many tokens
as leave half of a byte budget to their gradients:
    dh = (1 - p) · (mean of W by softmax without the label - W[label]),   loss = softplus(logsumexp without label - l[label])
Gradients are made in the forward pass: two products a token. Kept: dh.
Chunks of tokens, in Triton and with an adapter: their logits fit a byte budget and become their own gradient in place. Two
products a token, which read the head for each chunk. Kept: dh (and dA, dC, dB).
Tiles of tokens by vocabulary, in Triton: the logits of a chunk do not exist either. The forward pass leaves one log-sum-exp
a token; backward makes each tile again, and a kernel passes over those whose gradient is below the type's resolution: three
products a token, less what is passed over. Kept: h, the log-sum-exps.

A chunk of T tokens does T operations for each byte of a head in 16 bits that it reads; tiles read it two or three times,
however many tokens there are. So a dense head goes by tiles only where the budget leaves fewer than 64 tokens a chunk, a
packed one always. In Triton dh is a sum of atomic additions there, so its last bits differ from run to run.
Source: Milakov & Gimelshein 2018, arXiv 1805.02867 (running softmax); Wijmans et al. 2024, arXiv 2411.09009 (tiles); Hsu et
al. 2024, arXiv 2410.10989 (gradient in the forward pass).
"""

from collections.abc import Iterator
from itertools import product
from math import isfinite
from typing import Any

import torch

from edge_kernels.backend import Launch, jit, on_triton, tl, triton
from edge_kernels.quant import BLOCK, GROUP, Packed, expand
from edge_kernels.tiles import check_packed, expand_tile, pointer_types, pointers

IGNORED = -100
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PIECE = 4 << 20  # bytes of a packed head's rows that are expanded at once in torch
FEWEST = 64  # tokens a chunk: with fewer, reading the head twice for each costs more than another product
NEVER = -1e30  # a logit whose exponential is 0 beside any other's


def linear_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor | Packed,
    labels: torch.Tensor,
    softcap: float | None = None,
    chunk_bytes: int = 32 << 20,
    A: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The loss, a float32 scalar; 0 when every label is ignored.

    Args:
        hidden: (..., n) last hidden states, already shifted against the labels; float32, float16 or bfloat16.
        head: (vocabulary, n) frozen, of hidden's dtype, or packed.
        labels: (...) int64 in 0..vocabulary-1, or IGNORED.
        softcap: bound of the logits (Gemma 2), or None.
        chunk_bytes: logits, of hidden's dtype, that may exist at once.
        A, C, B, scale: an adapter on the head, (r, n), (r, r) or None for the identity, (vocabulary, r); any float dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, a label is out of range, or softcap, chunk_bytes or scale is no
            usable number.
    """
    vocabulary, width = head.shape
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden has tokens {tuple(hidden.shape[:-1])} but labels have {tuple(labels.shape)}"
        )
    if hidden.shape[-1] != width:
        raise ValueError(f"hidden has rows of {hidden.shape[-1]} but head reads {width}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden is {hidden.dtype} but has to be float32, float16 or bfloat16")
    if softcap is not None and not (isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap} but has to be above 0, or None")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes} but has to be above 0")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} but have to be int64")
    if isinstance(head, Packed):
        check_packed("head", head)
    elif head.dtype != hidden.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but head is {head.dtype}: hold them in one type")
    _check_adapter(A, C, B, scale, vocabulary, width)

    flat = labels.reshape(-1)
    kept = flat != IGNORED
    wrong = kept & ((flat < 0) | (flat >= vocabulary))
    tokens, faults = torch.stack((kept.sum(), wrong.sum())).tolist()  # the one wait for a GPU
    if faults:
        lowest, highest = torch.stack(flat[kept].aminmax()).tolist()
        raise ValueError(f"labels go from {lowest} to {highest}, the head has {vocabulary} rows")
    index = None if tokens == len(flat) else torch.argsort(~kept, stable=True)[:tokens]
    targets = flat if index is None else flat[index]
    rows = hidden.reshape(-1, width)
    if not torch.is_grad_enabled():  # else the Function would make the gradients nevertheless
        rows, A, C, B = (None if part is None else part.detach() for part in (rows, A, C, B))
    way = _Chunks if A is not None or not tokens else _way(rows, head, tokens, chunk_bytes)
    loss: torch.Tensor = way.apply(
        rows, index, head, targets, softcap, chunk_bytes, *((A, C, B, scale) if way is _Chunks else ())
    )
    return loss


def _check_adapter(A: Any, C: Any, B: Any, scale: float, vocabulary: int, width: int) -> None:
    if (A is None) != (B is None) or (A is None and C is not None):
        raise ValueError("an adapter is A and B, and C where it has a core: give all of its factors or none")
    if A is None:
        return
    rank = A.shape[0]
    for name, factor, needed in (
        ("A", A, (rank, width)),
        ("C", C, (rank, rank)),
        ("B", B, (vocabulary, rank)),
    ):
        if factor is not None and tuple(factor.shape) != needed:
            raise ValueError(f"{name} is {tuple(factor.shape)} but has to be {needed}")
    if not isfinite(scale):
        raise ValueError(f"scale is {scale} but has to be finite")


def _way(rows: torch.Tensor, head: torch.Tensor | Packed, tokens: int, chunk_bytes: int) -> Any:
    if not on_triton(rows):
        return _Sweep
    if rows.dtype == torch.float32:
        return _Chunks  # exact float32 products have no tensor cores: a library's are faster than a kernel's
    few = _tokens_a_chunk(rows, head.shape[0], chunk_bytes) < min(tokens, FEWEST)
    return _Tiles if isinstance(head, Packed) or (few and head.is_contiguous()) else _Chunks


def _tokens_a_chunk(rows: torch.Tensor, vocabulary: int, chunk_bytes: int) -> int:
    tokens = max(chunk_bytes // (rows.element_size() * vocabulary), 1)
    return tokens - tokens % 8 if tokens > 8 else tokens  # whole registers for the products


def _groups(
    rows: torch.Tensor, index: torch.Tensor | None, tokens: int, step: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The kept tokens, so many at a time: where they are among them, and their rows."""
    step = max(step, 1)
    for first in range(0, tokens, step):
        chunk = slice(first, min(first + step, tokens))
        yield chunk, rows[chunk] if index is None else rows[index[chunk]]


def _tokens_a_strip(logits: torch.Tensor, softcap: float | None, chunk_bytes: int) -> int:
    """Tokens whose logits in float32, and what is made of them, take half the budget. Strips that fit a core's cache are no
    faster, and much slower where another process has one of the cores, since each short operation then waits for it."""
    return max(chunk_bytes // ((8 if softcap is None else 24) * logits.shape[1]), 1)


def _cap_in_place(logits: torch.Tensor, softcap: float | None) -> torch.Tensor | None:
    """cap(u) over u; cap'(u), or None where nothing is capped."""
    if softcap is None:
        return None
    slope = logits.div_(softcap).tanh_().square().neg_().add_(1)
    logits.mul_(softcap)
    return slope


# --- a sweep over the vocabulary, in torch


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, head, targets, softcap, chunk_bytes):  # type: ignore[no-untyped-def]
        tokens, width = len(targets), rows.shape[1]
        dh = rows.new_empty(tokens, width) if ctx.needs_input_grad[0] else None
        losses = torch.empty(tokens, device=rows.device)
        step = chunk_bytes // (8 * width)  # whose gradient in float32 is half the budget
        for chunk, x in _groups(rows, index, tokens, step):
            _sweep(
                x,
                head,
                targets[chunk],
                softcap,
                chunk_bytes,
                losses[chunk],
                None if dh is None else dh[chunk],
            )
        ctx.save_for_backward(index, dh)
        ctx.shape = rows.shape
        return losses.mean()

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        index, dh = ctx.saved_tensors
        return _placed(dh, dloss / len(dh), index, ctx.shape), None, None, None, None, None


def _sweep(x, head, targets, softcap, chunk_bytes, losses, dh):  # type: ignore[no-untyped-def]
    """Fill in the loss of each token and, unless it is None, its gradient."""
    log_sum = torch.full((len(x),), -torch.inf, device=x.device)  # without the label's
    wanted = torch.zeros(len(x), device=x.device)
    mean = None if dh is None else torch.zeros(x.shape, device=x.device)
    buffer = None
    for columns, weight in _pieces(head, x.dtype, chunk_bytes // (x.element_size() * len(x))):
        buffer = x.new_empty(len(x) * len(weight)) if buffer is None else buffer  # no later piece is larger
        logits = torch.mm(x, weight.T, out=buffer[: len(x) * len(weight)].view(len(x), -1))
        place = targets - columns.start
        here = (place >= 0) & (place < len(weight))
        place.clamp_(0, len(weight) - 1)
        piece = _softmax_in_place(logits, place, here, wanted, softcap, chunk_bytes)
        joint = torch.logaddexp(log_sum, piece)
        if mean is not None:
            mean.mul_((log_sum - joint).exp_()[:, None]).addcmul_(
                logits @ weight, (piece - joint).exp_()[:, None]
            )
            dh[here] = weight[place[here]]
        log_sum = joint
    losses.copy_(torch.nn.functional.softplus(log_sum - wanted))
    if mean is not None:
        slope = 1.0 if softcap is None else 1 - (wanted / softcap).square_()[:, None]
        dh.copy_(mean.sub_(slope * dh).mul_(torch.sigmoid(log_sum - wanted)[:, None]))


def _softmax_in_place(logits, place, here, wanted, softcap, chunk_bytes):  # type: ignore[no-untyped-def]
    """Logits of a piece into their softmax without the label, times cap'; its log-sum-exps. Notes the label's logit.

    In float32, a strip of tokens at a time.
    """
    step = _tokens_a_strip(logits, softcap, chunk_bytes)
    sums = torch.empty(len(logits), device=logits.device)
    for part in zip(
        *(x.split(step) for x in (logits, place[:, None], here[:, None], wanted, sums)), strict=True
    ):
        some, column, among, label, log_sum = part
        strip = some.float()
        slope = _cap_in_place(strip, softcap)
        seen = strip.gather(-1, column)
        label.copy_(torch.where(among, seen, label[:, None])[:, 0])
        strip.scatter_(-1, column, torch.where(among, NEVER, seen))
        highest = strip.amax(-1)
        torch.softmax(strip, -1, out=strip)
        torch.sub(highest, strip.amax(-1).log_(), out=log_sum)
        some.copy_(strip if slope is None else strip.mul_(slope))
    return sums


def _placed(dh, share, index, shape):  # type: ignore[no-untyped-def]
    """share · dh among all rows; scaled in float32: a share of 1 / tokens is no normal number in float16."""
    scaled = torch.mul(dh, share.view(1), out=torch.empty_like(dh))
    return scaled if index is None else dh.new_zeros(shape).index_copy_(0, index, scaled)


# --- chunks: the products are torch's, and what turns logits into their gradient is torch's or a kernel


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, head, targets, softcap, chunk_bytes, A, C, B, scale):  # type: ignore[no-untyped-def]
        tokens, vocabulary, device = len(targets), head.shape[0], rows.device
        step = min(_tokens_a_chunk(rows, vocabulary, chunk_bytes), tokens)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:9])
        factors: list[Any] = [None if factor is None else factor.to(rows.dtype) for factor in (A, C, B)]
        a, c, b = factors
        dh = rows.new_empty(tokens, rows.shape[1]) if needs[0] else None
        dA, dC, dB = (
            torch.zeros(factor.shape, device=device) if needed else None
            for factor, needed in zip((A, C, B), needs[1:], strict=True)
        )
        losses = torch.empty(tokens, device=device)
        buffer = rows.new_empty(step, vocabulary)
        for chunk, x in _groups(rows, index, tokens, step):
            dl = logits = buffer[: len(x)]
            for columns, weight in _pieces(head, rows.dtype):
                torch.mm(x, weight.T, out=logits[:, columns])
            if a is not None:
                z = x @ a.T
                u = scale * (z if c is None else z @ c.T)
                logits.addmm_(u, b.T)
            (_triton_gradient if on_triton(rows) else _torch_gradient)(
                logits, targets[chunk], losses[chunk], softcap, any(needs), chunk_bytes
            )
            if dh is not None:
                _product(dl, head, out=dh[chunk])
            if a is not None and any(needs):
                du = scale * (dl @ b)
                dz = du if c is None else du @ c
                if dh is not None:
                    dh[chunk].addmm_(dz, a)
                if dA is not None:
                    dA += dz.T @ x
                if dC is not None:
                    dC += du.T @ z
                if dB is not None:
                    dB += dl.T @ u
        ctx.save_for_backward(index, dh, dA, dC, dB)
        ctx.tokens, ctx.like = tokens, [None if part is None else part.dtype for part in (A, C, B)]
        ctx.shape = rows.shape
        return losses.sum() / max(tokens, 1)

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        index, dh, *dfactors = ctx.saved_tensors
        share = dloss / max(ctx.tokens, 1)
        drows = None if dh is None else _placed(dh, share, index, ctx.shape)
        factors = [
            None if d is None else (d * share).to(dtype) for d, dtype in zip(dfactors, ctx.like, strict=True)
        ]
        return drows, None, None, None, None, None, *factors, None


def _pieces(
    head: torch.Tensor | Packed, dtype: torch.dtype, most: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The head in pieces of vocabulary rows, at most so many or GROUP; a packed one's are expanded, one over the other."""
    vocabulary, width = head.shape
    step = vocabulary if most is None else max(most, GROUP)
    if isinstance(head, torch.Tensor):
        for first in range(0, vocabulary, step):
            yield slice(first, min(first + step, vocabulary)), head[first : first + step]
        return
    step = max(min(step, PIECE // (dtype.itemsize * width)) // GROUP, 1) * GROUP
    buffer = torch.empty(min(step, vocabulary), width, dtype=dtype, device=head.quants.device)
    for first in range(0, vocabulary, step):
        rows = slice(first, min(first + step, vocabulary))
        yield rows, expand(head.rows(rows), out=buffer[: rows.stop - first])


def _product(dl: torch.Tensor, head: torch.Tensor | Packed, out: torch.Tensor) -> None:
    """out = dl W; the pieces of a packed head add up in float32."""
    if isinstance(head, torch.Tensor):
        torch.mm(dl, head, out=out)
        return
    total = torch.zeros(out.shape, device=out.device)
    for columns, weight in _pieces(head, dl.dtype):
        total += dl[:, columns] @ weight
    out.copy_(total)


def _torch_gradient(logits, targets, losses, softcap, wanted, chunk_bytes):  # type: ignore[no-untyped-def]
    """Write each token's loss, and where wanted its gradient over its logits: float32 within, a strip at a time."""
    step = _tokens_a_strip(logits, softcap, chunk_bytes)
    buffer = logits.new_empty(
        min(step, len(logits)), logits.shape[1], dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    for part in zip(logits.split(step), targets.split(step), losses.split(step), strict=True):
        _strip_gradient(buffer[: len(part[0])], *part, softcap, wanted)


def _strip_gradient(strip, logits, targets, losses, softcap, wanted):  # type: ignore[no-untyped-def]
    strip, target = logits if logits.dtype == strip.dtype else strip.copy_(logits), targets[:, None]
    slope = _cap_in_place(strip, softcap)
    torch.log_softmax(strip, -1, out=strip)
    losses.copy_(strip.gather(-1, target)[:, 0].neg_())
    if wanted:
        dl = strip.exp_()
        dl.scatter_add_(-1, target, dl.new_full(target.shape, -1))
        logits.copy_(dl if slope is None else dl.mul_(slope))


def _triton_gradient(logits, targets, losses, softcap, wanted, _chunk_bytes):  # type: ignore[no-untyped-def]
    tokens, vocabulary = logits.shape
    _gradient_kernel[(tokens,)](
        logits,
        targets,
        losses,
        vocabulary,
        softcap or 1.0,
        CAPPED=softcap is not None,
        WANTED=wanted,
        **GRADIENT,
    )


GRADIENT: dict[str, Any] = {"BLOCK": 4096, "num_warps": 8}


@jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    targets_ptr,
    losses_ptr,
    vocabulary,
    softcap,
    CAPPED: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: its loss, then its logits' gradient over the logits."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocabulary
    target = tl.load(targets_ptr + row)
    wanted = tl.load(logits_ptr + target).to(tl.float32)
    if CAPPED:
        wanted = _cap(wanted, softcap)
    peak = tl.full(
        (BLOCK,), -1e38, tl.float32
    )  # each lane keeps its own; finite, so that a lane without logits adds 0
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        if CAPPED:
            logits = tl.where(columns < vocabulary, _cap(logits, softcap), float("-inf"))
        higher = tl.maximum(peak, logits)
        total = total * tl.exp(peak - higher) + tl.exp(logits - higher)
        peak = higher
    highest = tl.max(peak, axis=0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(peak - highest), axis=0))
    tl.store(losses_ptr + row, log_sum - wanted)
    if WANTED:
        for first in range(0, vocabulary, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            logits = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            if CAPPED:
                logits = _cap(logits, softcap)
            dl = tl.exp(logits - log_sum) - (columns == target).to(tl.float32)
            if CAPPED:
                dl *= 1 - (logits / softcap) * (logits / softcap)
            tl.store(logits_ptr + columns, dl, mask=inside)


@jit
def _cap(logits, softcap):  # type: ignore[no-untyped-def]
    return softcap * (1 - 2 / (tl.exp(2 * logits / softcap) + 1))  # tanh; the interpreter has no libdevice


# --- tiles, in Triton: what is kept is one log-sum-exp a token


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, head, targets, softcap, chunk_bytes):  # type: ignore[no-untyped-def]
        tokens = len(targets)
        log_sum, wanted = (torch.empty(tokens, device=rows.device) for _ in range(2))
        for chunk, x in _groups(rows, index, tokens, _tokens_a_tile_group(rows, head.shape[0], chunk_bytes)):
            log_sum[chunk], wanted[chunk] = _log_sum(x, head, targets[chunk], softcap)
        ctx.save_for_backward(rows, index, targets, log_sum)
        ctx.head, ctx.softcap, ctx.chunk_bytes = head, softcap, chunk_bytes
        return (log_sum - wanted).sum() / tokens

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        rows, index, targets, log_sum = ctx.saved_tensors
        tokens = len(targets)
        drows = torch.empty_like(rows) if index is None else torch.zeros_like(rows)
        step = _tokens_a_tile_group(rows, ctx.head.shape[0], ctx.chunk_bytes)
        for chunk, x in _groups(rows, index, tokens, step):
            dh = torch.zeros(x.shape, device=x.device)
            _dhidden(dh, x, ctx.head, targets[chunk], log_sum[chunk], ctx.softcap)
            drows[chunk if index is None else index[chunk]] = dh.mul_(dloss / tokens).to(rows.dtype)
        return drows, None, None, None, None, None


def _tokens_a_tile_group(rows: torch.Tensor, vocabulary: int, chunk_bytes: int) -> int:
    """So many that their gradient in float32 and the log-sum-exps of their tiles fit the budget."""
    return max(chunk_bytes // (4 * max(rows.shape[1], vocabulary // 32)), 16)


def _log_sum(x, head, targets, softcap):  # type: ignore[no-untyped-def]
    format = head.format if isinstance(head, Packed) else "dense"
    x, (tokens, width), vocabulary = x.contiguous(), x.shape, head.shape[0]
    tile = _tile(tokens, format)
    pieces = triton.cdiv(vocabulary, tile["V"])
    log_sums, wanted = (
        x.new_empty(pieces, tokens, dtype=torch.float32),
        torch.empty(tokens, device=x.device),
    )
    sizes = (tokens, vocabulary, width, softcap or 1.0)
    _log_sum_kernel[(triton.cdiv(tokens, tile["M"]) * pieces,)](
        x,
        *pointers(head),
        targets,
        log_sums,
        wanted,
        *sizes,
        CAPPED=softcap is not None,
        FORMAT=format,
        **tile,
    )
    return log_sums.logsumexp(0), wanted


def _dhidden(dh, x, head, targets, log_sum, softcap):  # type: ignore[no-untyped-def]
    format = head.format if isinstance(head, Packed) else "dense"
    x, (tokens, width), vocabulary = x.contiguous(), x.shape, head.shape[0]
    tile = _tile(tokens, format)
    sizes = (tokens, vocabulary, width, softcap or 1.0, torch.finfo(x.dtype).eps / 32)
    _dhidden_kernel[(triton.cdiv(tokens, tile["M"]) * triton.cdiv(vocabulary, tile["V"]),)](
        x, *pointers(head), targets, log_sum, dh, *sizes, CAPPED=softcap is not None, FORMAT=format, **tile
    )


def _tile(tokens: int, format: str) -> dict[str, Any]:
    """M tokens by V logits, K of the width at a time; at most 72 KiB of shared memory, which every architecture has."""
    return {
        "M": 16 if tokens <= 16 else 64,
        "V": 128 if format == "dense" else 64,  # a packed tile needs registers to be expanded in
        "K": 64,
        "num_warps": 4 if format == "dense" or tokens <= 16 else 8,
        "num_stages": 3 if format == "dense" else 4,
    }


@jit
def _log_sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    quants_ptr,
    scales_ptr,
    mins_ptr,
    groups_ptr,
    offset_ptr,
    tables_ptr,
    targets_ptr,
    log_sums_ptr,
    wanted_ptr,
    tokens,
    vocabulary,
    width,
    softcap,
    CAPPED: tl.constexpr,
    FORMAT: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
):
    """The log-sum-exp of a tile's logits, and the wanted logit of those tokens whose label is among them."""
    row, column, piece = _place(tokens, M, V)
    x_row = tl.minimum(row, tokens - 1).to(tl.int64) * width
    head_row = tl.minimum(column, vocabulary - 1).to(tl.int64)
    logits = tl.zeros((M, V), tl.float32)
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        x = tl.load(x_ptr + x_row[:, None] + k[None, :], mask=k[None, :] < width, other=0.0)
        weight = expand_tile(
            quants_ptr,
            scales_ptr,
            mins_ptr,
            groups_ptr,
            offset_ptr,
            tables_ptr,
            head_row,
            first,
            width,
            FORMAT,
            V,
            K,
        )
        logits = tl.dot(x, weight.to(x.dtype).T, logits, input_precision="ieee")
    if CAPPED:
        logits = _cap(logits, softcap)
    logits = tl.where(column[None, :] < vocabulary, logits, float("-inf"))
    peak = tl.max(logits, axis=1)
    log_sum = peak + tl.log(tl.sum(tl.exp(logits - peak[:, None]), axis=1))
    inside = row < tokens
    tl.store(log_sums_ptr + piece.to(tl.int64) * tokens + row, log_sum, mask=inside)
    target = tl.load(targets_ptr + row, mask=inside, other=-1)
    hit = column[None, :] == target[:, None]
    here = (target >= piece * V) & (target < piece * V + V)
    tl.store(wanted_ptr + row, tl.sum(tl.where(hit, logits, 0.0), axis=1), mask=inside & here)


@jit
def _dhidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    quants_ptr,
    scales_ptr,
    mins_ptr,
    groups_ptr,
    offset_ptr,
    tables_ptr,
    targets_ptr,
    log_sum_ptr,
    dh_ptr,
    tokens,
    vocabulary,
    width,
    softcap,
    least,
    CAPPED: tl.constexpr,
    FORMAT: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
):
    """Add dl W of a tile to dh, unless the sum of the tile's gradient is below `least` for every token."""
    row, column, _ = _place(tokens, M, V)
    x_row = tl.minimum(row, tokens - 1).to(tl.int64) * width
    head_row = tl.minimum(column, vocabulary - 1).to(tl.int64)
    logits = tl.zeros((M, V), tl.float32)
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        x = tl.load(x_ptr + x_row[:, None] + k[None, :], mask=k[None, :] < width, other=0.0)
        weight = expand_tile(
            quants_ptr,
            scales_ptr,
            mins_ptr,
            groups_ptr,
            offset_ptr,
            tables_ptr,
            head_row,
            first,
            width,
            FORMAT,
            V,
            K,
        )
        logits = tl.dot(x, weight.to(x.dtype).T, logits, input_precision="ieee")
    if CAPPED:
        logits = _cap(logits, softcap)
    inside = row < tokens
    log_sum = tl.load(log_sum_ptr + row, mask=inside, other=float("inf"))
    target = tl.load(targets_ptr + row, mask=inside, other=-1)
    dl = tl.where(column[None, :] < vocabulary, tl.exp(logits - log_sum[:, None]), 0.0)
    # in float32: a sure token's gradient is a small difference
    dl -= (column[None, :] == target[:, None]).to(tl.float32)
    if tl.max(tl.sum(tl.abs(dl), axis=1), axis=0) >= least:
        slope = 1 - (logits / softcap) * (logits / softcap) if CAPPED else 1.0
        rounded = (dl * slope).to(x_ptr.dtype.element_ty)
        for first in range(0, width, K):
            k = first + tl.arange(0, K)
            weight = expand_tile(
                quants_ptr,
                scales_ptr,
                mins_ptr,
                groups_ptr,
                offset_ptr,
                tables_ptr,
                head_row,
                first,
                width,
                FORMAT,
                V,
                K,
            )
            part = tl.dot(rounded, weight.to(rounded.dtype), input_precision="ieee")
            where = dh_ptr + row.to(tl.int64)[:, None] * width + k[None, :]
            tl.atomic_add(where, part, mask=inside[:, None] & (k[None, :] < width), sem="relaxed")


@jit
def _place(tokens, M: tl.constexpr, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of this program's tile; programs that read the same rows of the head follow one another."""
    blocks = tl.cdiv(tokens, M)
    piece = tl.program_id(0) // blocks
    return (tl.program_id(0) % blocks) * M + tl.arange(0, M), piece * V + tl.arange(0, V), piece


def ahead_of_time(capability: int) -> list[Launch]:
    """Every configuration that the launches above choose on an architecture; with a softcap, which only adds to them."""
    capped = {"CAPPED": True}
    launches = []
    for name in ("bf16", "fp16", "fp32"):
        signature = {"logits_ptr": f"*{name}", "targets_ptr": "*i64", "losses_ptr": "*fp32"}
        signature |= {"vocabulary": "i32", "softcap": "fp32"}
        constants = capped | {"WANTED": True, "BLOCK": GRADIENT["BLOCK"]}
        label = f"linear_cross_entropy {name} gradient"
        launches.append(
            Launch(
                label,
                _gradient_kernel,
                signature,
                constants,
                GRADIENT["num_warps"],
                divisible=("vocabulary",),
            )
        )
        for format, tokens in product(("dense", *BLOCK) if name != "fp32" else (), (16, 17)):
            tile = _tile(tokens, format)
            parts = (
                {part: f"*{name}" for part in pointer_types("q8_0")}
                if format == "dense"
                else pointer_types(format)
            )
            sizes = {"tokens": "i32", "vocabulary": "i32", "width": "i32", "softcap": "fp32"}
            for kernel, own in (
                (_log_sum_kernel, {"log_sums_ptr": "*fp32", "wanted_ptr": "*fp32", **sizes}),
                (_dhidden_kernel, {"log_sum_ptr": "*fp32", "dh_ptr": "*fp32", **sizes, "least": "fp32"}),
            ):
                signature = {"x_ptr": f"*{name}", **parts, "targets_ptr": "*i64", **own}
                constants = capped | {"FORMAT": format} | {axis: tile[axis] for axis in ("M", "V", "K")}
                label = f"linear_cross_entropy {name} {kernel.__name__.strip('_')} {format} M={tile['M']}"
                how = (tile["num_warps"], tile["num_stages"], ("width",), True)
                launches.append(Launch(label, kernel, signature, constants, *how))
    return launches
