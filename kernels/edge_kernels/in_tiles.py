"""A function of each token by itself, such as an MLP, run on a number of tokens at a time.

    y = f(x)        dx and the gradients of f's parameters: tile by tile, where f runs again first

Kept for backward: x. The intermediate tensors of f exist for one tile. As the last operation of a
checkpointed block the tiles cost no time: the block's second run ends at x, so f runs twice in all,
as it does without tiles. Source: Bekman et al. 2025, arXiv 2506.13996 (tiled MLP).
"""

from collections.abc import Callable, Sequence

import torch

from edge_kernels.checkpoint_block import innermost, nothing_reads, start

Rows = Callable[[torch.Tensor], torch.Tensor]


def in_tiles(
    function: Rows, x: torch.Tensor, tokens: int, trained: Sequence[torch.nn.Parameter]
) -> torch.Tensor:
    """Run the function over x; the result is shaped and typed like x.

    Args:
        function: (rows, n) to the same shape; deterministic, and each row by itself.
        x: (..., n) of any float dtype.
        tokens: rows at a time; x that has no more rows is not cut.
        trained: the function's parameters that require gradients. Each gets its whole gradient
            after the last tile.

    Raises:
        ValueError: tokens is not positive.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}, but has to be positive")
    if x.shape[:-1].numel() <= tokens:
        return function(x)
    y: torch.Tensor = _InTiles.apply(x, function, tokens, *trained)
    return y


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, tokens, *trained):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.function, ctx.tokens, ctx.trained = function, tokens, trained
        y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)  # the result where nothing reads it
        if not nothing_reads(ctx.needs_input_grad, (x,)):
            with innermost(None):
                for tile, result in zip(_tiles(x, tokens), _tiles(y, tokens), strict=True):
                    result.copy_(function(tile))
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in ctx.trained]
        tiles = (_tiles(tensor, ctx.tokens) for tensor in (x, dy, dx))
        for tile, dy_tile, dx_tile in zip(*tiles, strict=True):
            with torch.enable_grad():
                leaf = tile.detach().requires_grad_()
                y = ctx.function(leaf)
            dleaf, *grads = torch.autograd.grad(start([y], [dy_tile]), (leaf, *ctx.trained))
            dx_tile.copy_(dleaf)
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        return (dx, None, None, *(total.to(p.dtype) for total, p in zip(sums, ctx.trained, strict=True)))


def _tiles(x: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
    rows = x.reshape(-1, x.shape[-1])
    # tiles of equal size: the memory that one frees fits the next
    return rows.chunk(-(-len(rows) // tokens))
