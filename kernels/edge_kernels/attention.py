"""Causal attention whose backward pass, on a CPU and in 16 bits, multiplies tiles of queries in float32.

    o = softmax(scale · q kᵀ, where key <= query) v
    p = softmax again,  ds = p · (do vᵀ - sum(do · o)),   dq = scale · ds k,  dk = scale · dsᵀ q,  dv = pᵀ do

Forward is torch's. Torch's own backward for 16 bits asks its matrix library for each small product, inside its threads: for
short rows that costs several times the arithmetic. Here one batched product takes all heads of a tile, and only float32
stands between its operands and its results. Long rows stay with torch, whose products in 16 bits are twice as fast.
Kept for backward: q, k, v, o.
Source: Dao 2023, arXiv 2307.08691 (the gradient in tiles).
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

SHORT = 512  # tokens up to which tiles are faster
TILE = 64  # queries
VALUES = 1 << 18  # float32 scores at once: a core's cache


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend to the keys up to each query's own.

    Args:
        q: (batch, heads, tokens, width) of any float type.
        k, v: (batch, key heads, tokens, width) of q's type; heads is a multiple of key heads.

    Returns:
        Shaped and typed like q.

    Raises:
        ValueError: shapes do not fit together.
    """
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: heads do not fit together")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q is {tuple(q.shape)} but k {tuple(k.shape)}: only their heads may differ")
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wanted and q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[2] <= SHORT:
        o: torch.Tensor = _Attention.apply(q, k, v, scale)
        return o
    return _forward(q, k, v, scale)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):  # type: ignore[no-untyped-def]
        o = _forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        q, k, v, o = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        step = max(VALUES // (q.shape[1] * min(TILE, q.shape[2]) * q.shape[2]), 1)
        for first in range(0, len(q), step):
            _rows_backward(ctx.scale, *(x[first : first + step] for x in (do, q, k, v, o, dq, dk, dv)))
        return dq, dk, dv, None


def _rows_backward(scale, do, q, k, v, o, dq, dk, dv):  # type: ignore[no-untyped-def]
    """Fill in the gradients of some rows. Batched: rows x key heads; the queries of a key's heads follow one another."""
    batch, (tokens, width) = k.shape[0] * k.shape[1], k.shape[2:]
    keys, values = (x.float().reshape(batch, tokens, width) for x in (k, v))
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    for first in range(0, tokens, TILE):
        tile = slice(first, min(first + TILE, tokens))
        own, seen = tile.stop - first, slice(0, tile.stop)
        queries, dout, out = (x[:, :, tile].float().reshape(batch, -1, width) for x in (q, do, o))
        queries *= scale
        p = queries @ keys[:, seen].mT
        later = torch.ones(own, own, dtype=torch.bool).triu(1)
        p.view(batch, -1, own, tile.stop)[..., first:].masked_fill_(later, -torch.inf)
        torch.softmax(p, -1, out=p)
        ds = dout @ values[:, seen].mT
        ds.sub_((dout * out).sum(-1, keepdim=True)).mul_(p)
        dkeys[:, seen].baddbmm_(ds.mT, queries)
        dvalues[:, seen].baddbmm_(p.mT, dout)
        dq[:, :, tile] = (ds @ keys[:, seen]).mul_(scale).view(*q.shape[:2], own, width)
    dk.copy_(dkeys.view(k.shape))
    dv.copy_(dvalues.view(v.shape))
