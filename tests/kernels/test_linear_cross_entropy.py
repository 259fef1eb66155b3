"""The loss and its gradient against float64, in chunks of any size, and that the whole logits never exist."""

import pytest
import torch
from edge_kernels import linear_cross_entropy
from edge_kernels.linear_cross_entropy import IGNORED
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16]
VOCABULARY = 50


def plain(hidden, head, labels, softcap=None, chunk_bytes=None):
    logits = hidden @ head.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def assert_as_good_as(ours, torchs, truth):
    """No error against float64 truth is over twice the worst of torch's own ops in the same dtype, plus one rounding."""
    limit = 2 * max(map(relative_error, torchs, truth)) + torch.finfo(ours[0].dtype).eps
    for one, two, true in zip(ours, torchs, truth, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        error = relative_error(one, true)
        assert error <= limit, f"relative error {error:.2e} over {limit:.2e}"


def relative_error(seen, truth):
    return float((seen.double() - truth).norm() / truth.norm())


def case(shape=(3, 7), dtype=torch.float32, ignored=0.4):
    torch.manual_seed(0)
    hidden, head = torch.randn(*shape, 24).to(dtype), torch.randn(VOCABULARY, 24).to(dtype)
    labels = torch.randint(VOCABULARY, shape)
    labels[torch.rand(shape) < ignored] = IGNORED
    return hidden, head, labels


def outcome(fn, hidden, head, labels, softcap, **more):
    leaf = hidden.clone().requires_grad_()
    loss = fn(leaf, head, labels, softcap, **more)
    (3 * loss).backward()
    return loss.detach(), leaf.grad


def check(fn, hidden, head, labels, softcap=None, **more):
    ours = outcome(fn, hidden, head, labels, softcap, **more)
    torchs = outcome(plain, hidden, head, labels, softcap)
    truth = outcome(plain, hidden.double(), head.double(), labels, softcap)
    assert_as_good_as(ours, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tokens_a_chunk", [1, 3, 4, 10**6])
def test_loss_and_gradient_match_float64_whatever_the_chunks(dtype, softcap, tokens_a_chunk):
    hidden, head, labels = case(dtype=dtype)
    kept = int((labels != IGNORED).sum())
    assert tokens_a_chunk == 1 or kept % tokens_a_chunk  # the last chunk is a smaller one
    check(linear_cross_entropy, hidden, head, labels, softcap, chunk_bytes=4 * VOCABULARY * tokens_a_chunk)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3, 4)])
def test_any_leading_axes_do(shape):
    check(linear_cross_entropy, *case(shape, ignored=0.0))


def test_a_chunk_smaller_than_one_row_of_logits_takes_one_token():
    check(linear_cross_entropy, *case(), chunk_bytes=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_every_label_ignored_loss_and_gradient_are_zero(dtype):
    hidden, head, labels = case(dtype=dtype, ignored=1.1)
    loss, gradient = outcome(linear_cross_entropy, hidden, head, labels, None)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(hidden))


def test_ignored_tokens_change_nothing_whatever_they_hold():
    hidden, head, labels = case()
    loss, _ = outcome(linear_cross_entropy, hidden, head, labels, None)
    hidden[labels == IGNORED] = float("nan")
    again, gradient = outcome(linear_cross_entropy, hidden, head, labels, None)
    assert loss == again
    assert torch.equal(gradient[labels == IGNORED], torch.zeros_like(gradient[labels == IGNORED]))


def count_ignored(hidden, head, labels, softcap=None):
    return linear_cross_entropy(hidden, head, labels, softcap) * (labels != IGNORED).sum() / labels.numel()


def learn_ignored(hidden, head, labels, softcap=None):
    return linear_cross_entropy(hidden, head, labels.clamp(min=0), softcap)


def no_gradient(hidden, head, labels, softcap=None):
    return linear_cross_entropy(hidden.detach(), head, labels, softcap) + 0 * hidden.sum()


def no_softcap(hidden, head, labels, softcap=None):
    return linear_cross_entropy(hidden, head, labels)


def forgets_what_came_back(hidden, head, labels, softcap=None):
    loss = linear_cross_entropy(hidden, head, labels, softcap)
    loss.register_hook(torch.ones_like)
    return loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [count_ignored, learn_ignored, no_gradient, no_softcap, forgets_what_came_back])
def test_the_check_sees_a_fault(fault, dtype):
    with pytest.raises(AssertionError, match="relative error"):
        check(fault, *case(dtype=dtype), 5.0)


def test_the_gradient_is_that_of_finite_differences():
    """The operator counts in float32, so the steps are wider than gradcheck's own."""
    hidden, head, labels = (part.double() if part.is_floating_point() else part for part in case((2, 3)))
    leaf = hidden.mul(0.1).requires_grad_()

    def agrees(fn):
        inputs = (leaf,)
        return torch.autograd.gradcheck(
            lambda h: fn(h, head, labels, 5.0), inputs, eps=1e-3, atol=2e-3, rtol=1e-2, raise_exception=False
        )

    assert agrees(linear_cross_entropy)
    assert not agrees(no_gradient)


class LargestFloat32(TorchDispatchMode):
    """Notes the most numbers that any one tensor has which an operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_the_logits_of_the_whole_batch_never_exist():
    hidden, head, labels = case((400,), ignored=0.0)
    tokens_a_chunk = 30  # 1500 logits; the batch's hidden states are 9600 numbers, its logits would be 20 000
    largest = {}
    for name, fn in (("chunks", linear_cross_entropy), ("whole", plain)):
        with LargestFloat32() as seen:
            outcome(fn, hidden, head, labels, None, chunk_bytes=4 * VOCABULARY * tokens_a_chunk)
        largest[name] = seen.numbers
    assert largest == {"chunks": hidden.numel(), "whole": 400 * VOCABULARY}


@pytest.mark.parametrize(
    ("hidden", "head", "labels", "message"),
    [
        ((2, 3, 4), (9, 4), torch.zeros(2, 2).long(), r"hidden has tokens \(2, 3\) but labels have \(2, 2\)"),
        ((2, 3, 4), (9, 5), torch.zeros(2, 3).long(), "hidden has rows of 4 but head reads 5"),
        ((2, 4), (9, 4), torch.tensor([0, 9]), "labels go from 0 to 9, the head has 9 rows"),
        ((2, 4), (9, 4), torch.tensor([-1, IGNORED]), "labels go from -1 to -1, the head has 9 rows"),
    ],
)
def test_what_does_not_fit_is_named(hidden, head, labels, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.ones(hidden), torch.ones(head), labels)
