"""The norm against float64, what it keeps, and what it refuses; with TRITON_INTERPRET=1 its kernels."""

from importlib import import_module

import pytest
import torch
from edge_kernels.backend import on_triton
from edge_kernels.norms import rms_norm
from numerics import DEVICE, ON_GPU, assert_as_good_as

INTERPRETED = on_triton(torch.ones(1)) and not ON_GPU
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def plain(x, weight, eps, offset):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


def outcome(fn, x, weight, dy, offset):
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = fn(leaf, weight, 1e-6, offset)
    y.backward(dy)
    return [y.detach(), leaf.grad]


def check(fn, dtype=torch.float32, shape=(3, 7), offset=0.0):
    torch.manual_seed(0)
    draws = [
        draw.to(DEVICE, dtype) for draw in (torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape))
    ]
    exact = [draw.double() for draw in draws]
    truth, torchs = outcome(plain, *exact, offset), outcome(plain, *draws, offset)
    assert_as_good_as(outcome(fn, *draws, offset), torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (4, 576), (2, 1000), (2, 2, 3, 2049)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_values_and_gradient_are_as_good_as_torchs(dtype, shape, offset):
    check(rms_norm, dtype, shape, offset)


def test_many_rows_are_taken_in_pieces(monkeypatch):
    monkeypatch.setattr(import_module("edge_kernels.norms"), "PIECE", 16)
    check(rms_norm, shape=(13, 7))


def test_rows_need_not_follow_one_another():
    torch.manual_seed(0)
    wide, weight = torch.randn(4, 20, device=DEVICE), torch.randn(8, device=DEVICE)
    for x in (wide[:, 3:11], wide[:, ::2][:, :8], wide.T[:16].unflatten(0, (2, 8)).transpose(1, 2)):
        dy = torch.ones(1, device=DEVICE).expand(x.shape)
        truth = outcome(plain, x.double(), weight.double(), dy.double(), 0.0)
        assert_as_good_as(outcome(rms_norm, x, weight, dy, 0.0), outcome(plain, x, weight, dy, 0.0), truth)


MUTANTS = {
    "no gradient": lambda x, w, eps, offset: rms_norm(x.detach(), w, eps, offset) + 0 * x,
    "the offset is missing": lambda x, w, eps, offset: rms_norm(x, w, eps, 0.0),
    "the weight is missing": lambda x, w, eps, offset: rms_norm(x, torch.ones_like(w), eps, offset),
    "the statistic is taken for a constant": lambda x, w, eps, offset: (
        x * (rms_norm(x, w, eps, offset) / x).detach()
    ),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_check_sees_a_fault(fault):
    with pytest.raises(AssertionError, match="relative error"):
        check(MUTANTS[fault], offset=1.0)


def test_no_rows_give_no_rows():
    x = torch.ones(0, 8, device=DEVICE, requires_grad=True)
    rms_norm(x, torch.ones(8, device=DEVICE)).sum().backward()
    assert x.grad.shape == (0, 8)


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="float64 is the torch backend's")
def test_gradients_are_those_of_finite_differences():
    x, weight = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight), x)


def test_x_and_a_number_a_row_are_kept():
    kept = []
    x, weight = torch.randn(6, 8, device=DEVICE, requires_grad=True), torch.randn(8, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        rms_norm(x, weight)
    assert sorted(kept) == [(6,), (6, 8), (8,)]


@pytest.mark.parametrize(
    ("x", "weight", "eps", "message"),
    [
        (torch.ones(2, 8), torch.ones(4), 1e-6, r"x is \(2, 8\) but weight \(4,\)"),
        (torch.ones(2, 8, dtype=torch.int64), torch.ones(8), 1e-6, "x is torch.int64"),
        (torch.ones(2, 8), torch.ones(8), 0.0, "eps is 0.0, but has to be above 0"),
    ],
)
def test_what_does_not_fit_is_named(x, weight, eps, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps)
