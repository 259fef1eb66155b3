"""An MLP in tiles against the same MLP at once: values, gradients, what is kept, and runs inside a checkpointed block."""

from functools import partial

import pytest
import torch
from edge_kernels.adamw8bit import AdamW8bit
from edge_kernels.adapter_linear import adapter_linear
from edge_kernels.checkpoint_block import checkpoint_block
from edge_kernels.in_tiles import in_tiles
from numerics import DEVICE, assert_as_good_as
from torch import nn

SHAPE = (2, 5, 8)


class MLP(nn.Module):
    """A frozen layer and one that trains; counts its runs and the most rows that it saw."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 12).requires_grad_(False), nn.Linear(12, 8)
        self.to(DEVICE, dtype)
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x.flatten(0, -2)))
        return self.down(self.up(x).tanh())


def tiled(tokens, mlp, x):
    return in_tiles(mlp, x, tokens, list(mlp.down.parameters()))


def at_once(mlp, x):
    return mlp(x)


def outcome(run, dtype=torch.float32, needs_x=True):
    mlp = MLP(dtype)
    leaf = torch.randn(SHAPE).to(DEVICE, dtype).requires_grad_(needs_x)
    y = run(mlp, leaf)
    (y * torch.arange(8, device=DEVICE)).sum().backward()
    return [y.detach(), *([leaf.grad] if needs_x else []), *(p.grad for p in mlp.down.parameters())]


def check(run, dtype=torch.float32, needs_x=True):
    truth = outcome(at_once, torch.float64, needs_x)
    assert_as_good_as(outcome(run, dtype, needs_x), outcome(at_once, dtype, needs_x), truth)


@pytest.mark.parametrize("tokens", [1, 3, 5, 9, 10, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_as_good_as_at_once(dtype, tokens):
    check(partial(tiled, tokens), dtype)


def test_an_input_that_wants_no_gradient():
    check(partial(tiled, 3), needs_x=False)


def test_gradcheck():
    mlp = MLP(torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: tiled(3, mlp, x), (x, *mlp.down.parameters()))


@pytest.mark.parametrize(
    "broken",
    [
        lambda mlp, x: tiled(3, mlp, x.detach()) + 0 * x,  # no way back
        lambda mlp, x: (
            in_tiles(mlp, x, 3, []) + 0 * sum(p.sum() for p in mlp.parameters())
        ),  # what trains is forgotten
        lambda mlp, x: torch.cat([tiled(3, mlp, x.flatten(0, 1)[:9]), torch.zeros(1, 8)]).view(
            SHAPE
        ),  # the rest is lost
    ],
)
def test_the_check_sees_an_operator_that_is_broken(broken):
    with pytest.raises(AssertionError, match="relative error"):
        check(broken)


def test_no_more_rows_than_a_tile_go_through_and_x_alone_is_kept():
    mlp, kept = MLP(), []
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = tiled(4, mlp, x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    y.sum().backward()
    assert mlp.rows == [4, 4, 2] * 2


def test_at_the_end_of_a_checkpointed_block_it_runs_twice_in_all():
    mlp = MLP()
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    checkpoint_block(lambda h: h + tiled(4, mlp, h), x).sum().backward()
    assert mlp.rows == [4, 4, 2] * 2
    y, other = x.grad.clone(), MLP()
    x.grad = None
    (x + other(x)).sum().backward()
    torch.testing.assert_close(y, x.grad)
    torch.testing.assert_close(mlp.down.weight.grad, other.down.weight.grad)


def test_before_something_that_reads_its_result_in_a_checkpointed_block():
    mlp, other = MLP(), MLP()
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    checkpoint_block(lambda h: h + tiled(4, mlp, h).sin(), x).sum().backward()
    seen, x.grad = x.grad, None
    (x + other(x).sin()).sum().backward()
    torch.testing.assert_close(seen, x.grad)


def test_inside_a_tile_no_layer_takes_itself_for_the_last_of_the_block():
    torch.manual_seed(0)
    weight = torch.randn(8, 8, device=DEVICE)
    factors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 8), (8, 2))]

    def block(
        h,
    ):  # after the layer, the tiles keep h and what follows three more: as many as the layer itself saves
        y = in_tiles(
            lambda rows: adapter_linear(rows, weight, factors[0], None, factors[1], 0.5), h, 4, factors
        )
        return h + y * y + y.sin()

    gradients = []
    for run in (lambda block, x: block(x), checkpoint_block):
        x = torch.ones(SHAPE, device=DEVICE, requires_grad=True)
        run(block, x).sum().backward()
        gradients.append([x.grad, *(factor.grad for factor in factors)])
        factors = [factor.detach().requires_grad_() for factor in factors]
    torch.testing.assert_close(*gradients)


def test_an_optimiser_inside_backward_steps_once():
    mlp, x = MLP(), torch.randn(SHAPE, device=DEVICE)
    optimiser = AdamW8bit(mlp.down.parameters(), lr=0.1)
    before = mlp.down.weight.detach().clone()
    tiled(2, mlp, x).sum().backward()
    optimiser.step()
    assert (mlp.down.weight - before).abs().max() < 0.11  # a first step of Adam is the learning rate
    assert mlp.down.weight.grad is None


def test_tiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="tokens is 0, but has to be positive"):
        tiled(0, MLP(), torch.ones(SHAPE))
