"""Rotary positions against float64, their memory, and what is refused; with TRITON_INTERPRET=1 their kernel."""

import pytest
import torch
from edge_kernels.backend import on_triton
from edge_kernels.rotary import rotary
from numerics import DEVICE, ON_GPU, assert_as_good_as

INTERPRETED = on_triton(torch.ones(1)) and not ON_GPU
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def plain(q, k, cos, sin):
    def turned(x):
        n = cos.shape[-1]
        x, passed = x[..., :n], x[..., n:]
        first, second = x.chunk(2, -1)
        y = x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
        return torch.cat((y, passed), -1)

    return turned(q), turned(k)


def case(dtype=torch.float32, heads=3, key_heads=1, tokens=5, width=8, n=8, batches=2, alike=True):
    """q and k laid out as a layer's projections leave them: (batch, tokens, heads, width), seen with heads first."""
    torch.manual_seed(0)
    q, k = (
        torch.randn(2, tokens, count, width).to(DEVICE, dtype).transpose(1, 2) for count in (heads, key_heads)
    )
    angles = torch.randn(batches, tokens, n // 2)
    angles = torch.cat((angles, angles), -1) if alike else torch.randn(batches, tokens, n)
    return q, k, angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def outcome(fn, q, k, cos, sin):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    turned = fn(*leaves, cos, sin)
    dys = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=DEVICE).view(x.shape) for x in turned]
    torch.autograd.backward(turned, dys)
    return [*(y.detach() for y in turned), *(leaf.grad for leaf in leaves)]


def check(fn, draws):
    truth = outcome(plain, *(draw.double() for draw in draws))
    assert_as_good_as(outcome(fn, *draws), outcome(plain, *draws), truth)


SHAPES = [
    {},
    {"heads": 9, "key_heads": 3, "width": 64, "n": 64, "batches": 1},
    {"tokens": 1, "width": 10, "n": 4},
    {"heads": 2, "width": 80, "n": 32},
    {"alike": False},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_good_as_torchs(dtype, shape):
    check(rotary, case(dtype, **shape))


def test_the_result_is_laid_out_like_the_input_which_stays_as_it_was():
    q, k, cos, sin = case()
    before = q.clone()
    turned, _ = rotary(q, k, cos, sin)
    assert turned.stride() == q.stride()
    assert torch.equal(q, before)


def test_positions_are_relative():
    q, k, *_ = case(heads=1, tokens=6)
    angles = torch.arange(6.0, device=DEVICE)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], device=DEVICE)
    angles = torch.cat((angles, angles), -1)[None]
    q, k = q[:, :, :1].expand(-1, -1, 6, -1), k[:, :, :1].expand(-1, -1, 6, -1)
    turned, keys = rotary(q, k, angles.cos(), angles.sin())
    scores = turned @ keys.transpose(-1, -2)
    assert torch.allclose(scores[0, 0].diagonal(1), scores[0, 0, 0, 1].expand(5), atol=1e-5)
    assert not torch.allclose(scores[0, 0, 0], scores[0, 0, 0, 0].expand(6), atol=1e-2)


MUTANTS = {
    "no gradient": lambda q, k, cos, sin: [
        y + 0 * q.sum() + 0 * k.sum() for y in rotary(q.detach(), k.detach(), cos, sin)
    ],
    "turned the other way": lambda q, k, cos, sin: rotary(q, k, cos, -sin),
    "q and k change places": lambda q, k, cos, sin: rotary(k.expand_as(q), q[:, :1], cos, sin),
    "the positions are one off": lambda q, k, cos, sin: rotary(q, k, cos.roll(1, 1), sin.roll(1, 1)),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_check_sees_a_fault(fault):
    with pytest.raises(AssertionError, match="relative error"):
        check(MUTANTS[fault], case())


def test_cos_and_sin_alone_are_kept():
    kept = []
    q, k, cos, sin = case()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotary(q.requires_grad_(), k.requires_grad_(), cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()] * 2


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="float64 is the torch backend's")
def test_gradients_are_those_of_finite_differences():
    q, k, cos, sin = (part.double() for part in case(tokens=2, width=6, n=4))
    assert torch.autograd.gradcheck(
        lambda q, k: rotary(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_())
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 5, 8)}, r"q is torch.float32 \(2, 5, 8\)"),
        ({"k": torch.ones(2, 1, 5, 8).int()}, "k is torch.int32"),
        ({"cos": torch.ones(2, 5, 7)}, "cos has rows of 7"),
        ({"cos": torch.ones(2, 5, 10)}, "cos has rows of 10, but an even number up to q's width 8"),
        ({"cos": torch.ones(3, 5, 8)}, r"cos is \(3, 5, 8\) but q \(2, 3, 5, 8\) needs \(2, 5, 8\)"),
        ({"sin": torch.ones(1, 5, 8)}, r"sin is \(1, 5, 8\) but cos \(2, 5, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    draws = dict(zip(("q", "k", "cos", "sin"), case(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        rotary(**draws)
