"""A function of each token by itself, such as an MLP, run so many tokens at a time, forward and again in backward.

    y = f(x)        dx, and the gradients of what f trains: tile by tile, where f runs again first

Kept for backward: x. What the operations of f make exists for one tile. As the last operation of a checkpointed block it
costs no time: the block's second run ends at x, so that f runs twice in all, as without tiles.
Source: Bekman et al. 2025, arXiv 2506.13996 (tiled MLP).
"""

from collections.abc import Callable, Sequence

import torch

from edge_kernels.checkpoint_block import nothing_reads, start, without_blocks

Rows = Callable[[torch.Tensor], torch.Tensor]


def in_tiles(
    function: Rows, x: torch.Tensor, tokens: int, trained: Sequence[torch.nn.Parameter]
) -> torch.Tensor:
    """Run the function over x.

    Args:
        function: (any number, n) to the same shape, each row by itself and without chance.
        x: (..., n) of any float type.
        tokens: rows at a time; up to as many go through as they are.
        trained: the parameters in the function that want gradients. They have one all at once, after the last tile.

    Returns:
        Shaped and typed like x.

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
        y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)  # and so they stay where nothing reads them
        if not nothing_reads(ctx.needs_input_grad, (x,)):
            with without_blocks():
                for part, into in zip(_tiles(x, tokens), _tiles(y, tokens), strict=True):
                    into.copy_(function(part))
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in ctx.trained]
        for part, dpart, into in zip(*(_tiles(tensor, ctx.tokens) for tensor in (x, dy, dx)), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                y = ctx.function(leaf)
            dleaf, *grads = torch.autograd.grad(start([y], [dpart]), (leaf, *ctx.trained))
            into.copy_(dleaf)
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        return (dx, None, None, *(total.to(p.dtype) for total, p in zip(sums, ctx.trained, strict=True)))


def _tiles(x: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
    rows = x.reshape(-1, x.shape[-1])
    return rows.chunk(-(-len(rows) // tokens))  # of one size: what one leaves in the heap fits the next
