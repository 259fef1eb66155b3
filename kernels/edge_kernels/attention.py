"""Causal attention; on a CPU in 16 bits, in tiles of queries, all heads at once.

    p = softmax(scale · q kᵀ, where key <= query),  o = p v
    p again,  ds = scale · p · (do vᵀ - sum(do · o)),   dq = ds k,  dk = dsᵀ q,  dv = pᵀ do

torch's own attention for 16 bits calls its matrix library for each small product, inside its
threads. For short rows that costs several times the arithmetic. Here one batched product takes all
heads of a tile. Scores, and their factors in the gradient, are float32 throughout. p and ds are
rounded once for their products: to bfloat16 where q is bfloat16, whose products are several times
as fast; float16 products are not, so p and ds stay float32 there. Long rows, other dtypes and GPUs
are left to torch. Kept for backward: q, k, v, o. Source: Dao 2023, arXiv 2307.08691 (the gradient
in tiles, and where it rounds).
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from edge_kernels.backend import row_pieces

SHORT = 512  # tokens up to which tiles are faster
TILE = 64  # queries
VALUES = 1 << 20  # float32 scores at a time; with fewer, threads wait for each other more often


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend from each query to the keys up to its position; the result is shaped and typed like q.

    Args:
        q: (batch, heads, tokens, width) of any float dtype.
        k: (batch, key heads, tokens, width) of q's dtype; heads is a multiple of key heads.
        v: shaped like k.
        scale: of the scores.

    Raises:
        ValueError: shapes do not fit together.
    """
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: heads do not fit together"
        )
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q is {tuple(q.shape)} but k {tuple(k.shape)}: only their heads may differ")
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[2] <= SHORT:
        o: torch.Tensor = _Attention.apply(q, k, v, scale)
        return o
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):  # type: ignore[no-untyped-def]
        o = torch.empty_like(q)
        for rows in _pieces(q):
            _rows_forward(scale, q[rows], k[rows], v[rows], o[rows])
        ctx.save_for_backward(q, k, v, o)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        tensors = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in tensors[:3]]
        for rows in _pieces(tensors[0]):
            _rows_backward(ctx.scale, do[rows], [x[rows] for x in tensors], [dx[rows] for dx in gradients])
        return *gradients, None


def _pieces(q: torch.Tensor) -> Iterator[slice]:
    """Rows of the batch whose scores of a tile may exist at the same time."""
    return row_pieces((len(q), q.shape[1] * min(TILE, q.shape[2]) * q.shape[2]), VALUES)


# Below, a batch is rows x key heads; the queries of all heads of a key follow each other.


def _rows_forward(scale, q, k, v, o):  # type: ignore[no-untyped-def]
    """Fill in o for some rows."""
    batch, (tokens, width) = k.shape[0] * k.shape[1], k.shape[2:]
    keys, values = (k.float().reshape(batch, tokens, width), v.to(_operand(v)).reshape(batch, tokens, width))
    for first in range(0, tokens, TILE):
        tile = slice(first, min(first + TILE, tokens))
        p = _softmax(q[:, :, tile].float().reshape(batch, -1, width).mul_(scale), keys, tile)
        o[:, :, tile] = (p.to(values.dtype) @ values[:, : tile.stop]).view(*q.shape[:2], -1, width)


def _rows_backward(scale, do, tensors, gradients):  # type: ignore[no-untyped-def]
    """Fill in the gradients for some rows."""
    (q, k, v, o), (dq, dk, dv) = tensors, gradients
    batch, (tokens, width) = k.shape[0] * k.shape[1], k.shape[2:]
    keys, values = (x.float().reshape(batch, tokens, width) for x in (k, v))
    factor = k.to(_operand(k)).reshape(batch, tokens, width)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    for first in range(0, tokens, TILE):
        tile = slice(first, min(first + TILE, tokens))
        past = slice(0, tile.stop)  # the keys that the tile attends to
        queries, dout, out = (x[:, :, tile].reshape(batch, -1, width) for x in (q, do, o))
        p = _softmax(queries.float().mul_(scale), keys, tile)
        wide = dout.float()
        ds = wide @ values[:, past].mT
        ds.sub_((wide * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        p, ds, queries, dout = (x.to(factor.dtype) for x in (p, ds, queries, dout))
        dkeys[:, past] += ds.mT @ queries
        dvalues[:, past] += p.mT @ dout
        dq[:, :, tile] = (ds @ factor[:, past]).view(*q.shape[:2], -1, width)
    dk.copy_(dkeys.view(k.shape))
    dv.copy_(dvalues.view(v.shape))


def _softmax(queries, keys, tile):  # type: ignore[no-untyped-def]
    """Probabilities of a tile's scaled queries over the keys up to the tile's end, in float32."""
    p = queries @ keys[:, : tile.stop].mT
    count = tile.stop - tile.start
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    p.view(len(p), -1, count, tile.stop)[..., tile.start :].masked_fill_(later, -torch.inf)
    return torch.softmax(p, -1, out=p)


def _operand(x: torch.Tensor) -> torch.dtype:
    """The dtype in which p, ds and their partners go through a product."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
