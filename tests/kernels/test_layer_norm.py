"""The norm against float64, and what it refuses; with TRITON_INTERPRET=1 its kernels."""

import pytest
import torch
from edge_kernels.backend import on_triton
from edge_kernels.norms import layer_norm
from numerics import DEVICE, ON_GPU, assert_as_good_as

INTERPRETED = on_triton(torch.ones(1)) and not ON_GPU
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def plain(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def outcome(fn, x, weight, bias, dy):
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = fn(leaf, weight, bias, 1e-5)
    y.backward(dy)
    return [y.detach(), leaf.grad]


def check(fn, dtype=torch.float32, shape=(3, 7), biased=True):
    torch.manual_seed(0)
    x, weight, bias, dy = (
        torch.randn(size).to(DEVICE, dtype) for size in (shape, shape[-1], shape[-1], shape)
    )
    draws = [x + 3, weight, bias if biased else None, dy]
    exact = [None if draw is None else draw.double() for draw in draws]
    assert_as_good_as(outcome(fn, *draws), outcome(plain, *draws), outcome(plain, *exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 7), (2, 5, 64), (4, 768), (2, 1000), (2, 2, 3, 2049)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradient_are_as_good_as_torchs(dtype, shape, biased):
    check(layer_norm, dtype, shape, biased)


def test_rows_need_not_follow_one_another():
    torch.manual_seed(0)
    wide, (weight, bias) = torch.randn(4, 20, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    for x in (wide[:, 3:11], wide[:, ::2][:, :8]):
        dy = torch.ones(4, 1, device=DEVICE).expand(x.shape)
        draws = (x, weight, bias, dy)
        truth = outcome(plain, *(draw.double() for draw in draws))
        ours, torchs = outcome(layer_norm, *draws), outcome(plain, *draws)
        assert_as_good_as(ours[:1], torchs[:1], truth[:1])
        assert torch.allclose(ours[1].double(), truth[1], atol=1e-5)


MUTANTS = {
    "no gradient": lambda x, w, b, eps: layer_norm(x.detach(), w, b, eps) + 0 * x,
    "the bias is missing": lambda x, w, b, eps: layer_norm(x, w, None, eps),
    "the weight is missing": lambda x, w, b, eps: layer_norm(x, torch.ones_like(w), b, eps),
    "the mean is taken for a constant": lambda x, w, b, eps: (
        layer_norm(x - x.mean(-1, keepdim=True), w, b, eps) + (x - x.detach())
    ),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_check_sees_a_fault(fault):
    with pytest.raises(AssertionError, match="relative error"):
        check(MUTANTS[fault])


def test_no_rows_give_no_rows():
    x = torch.ones(0, 8, device=DEVICE, requires_grad=True)
    layer_norm(x, torch.ones(8, device=DEVICE)).sum().backward()
    assert x.grad.shape == (0, 8)


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="float64 is the torch backend's")
def test_gradients_are_those_of_finite_differences():
    x, (weight, bias) = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 5).double(),
    )
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, weight, bias), x)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(4), None, r"x is \(2, 8\) but weight \(4,\)"),
        (torch.ones(8), torch.ones(4), r"bias is \(4,\) but weight \(8,\)"),
        (torch.ones(8).half(), None, "x is torch.float32 but weight is torch.float16"),
        (torch.ones(8), torch.ones(8).half(), "x is torch.float32 but bias is torch.float16"),
    ],
)
def test_what_does_not_fit_is_named(weight, bias, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(torch.ones(2, 8), weight, bias)
