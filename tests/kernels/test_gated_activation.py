"""The activations against float64, what is kept, and what is refused; with TRITON_INTERPRET=1 their kernels."""

import pytest
import torch
from edge_kernels.backend import on_triton
from edge_kernels.gated_activation import gated_activation
from numerics import DEVICE, ON_GPU, assert_as_good_as

INTERPRETED = on_triton(torch.ones(1)) and not ON_GPU
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
KINDS = ("silu", "gelu", "gelu_tanh")


def plain(gate, up, kind):
    if kind == "silu":
        return gate * torch.sigmoid(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def outcome(fn, gate, up, dy, kind):
    leaves = [part.detach().requires_grad_() for part in (gate, up)]
    y = fn(*leaves, kind)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check(fn, kind="silu", dtype=torch.float32, shape=(3, 7)):
    torch.manual_seed(0)
    draws = [(2 * torch.randn(shape)).to(DEVICE, dtype) for _ in range(3)]
    truth = outcome(plain, *(draw.double() for draw in draws), kind)
    assert_as_good_as(outcome(fn, *draws, kind), outcome(plain, *draws, kind), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 64), (2, 1536)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_as_good_as_torchs(kind, dtype, shape):
    check(gated_activation, kind, dtype, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_large_gates_stay_finite(kind):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE)
    for value in outcome(gated_activation, gate, torch.ones_like(gate), torch.ones_like(gate), kind):
        assert value.isfinite().all()


def test_halves_of_one_tensor_and_other_strides():
    torch.manual_seed(0)
    both, dy = torch.randn(2, 3, 16, device=DEVICE), torch.ones(1, device=DEVICE).expand(2, 3, 8)
    for gate, up in (
        both.chunk(2, -1),
        (both[..., ::2], both[..., 1::2]),
        (both[:, :, 3:11], both[:, :, 5:13]),
    ):
        truth = outcome(plain, gate.double(), up.double(), dy.double(), "silu")
        seen = outcome(gated_activation, gate, up, dy, "silu")
        assert_as_good_as(seen, outcome(plain, gate, up, dy, "silu"), truth)


MUTANTS = {
    "no gradient for the gate": lambda gate, up, kind: gated_activation(gate.detach(), up, kind) + 0 * gate,
    "no gradient for up": lambda gate, up, kind: gated_activation(gate, up.detach(), kind) + 0 * up,
    "gate and up change places": lambda gate, up, kind: gated_activation(up, gate, kind),
    "another activation": lambda gate, up, kind: gated_activation(gate, up, "gelu"),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_check_sees_a_fault(fault):
    with pytest.raises(AssertionError, match="relative error"):
        check(MUTANTS[fault])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="float64 is the torch backend's")
def test_gradients_are_those_of_finite_differences(kind):
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda gate, up: gated_activation(gate, up, kind), leaves)


def test_gate_and_up_alone_are_kept():
    kept = []
    gate, up = (torch.randn(6, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gated_activation(gate, up, "silu")
    assert kept == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize(
    ("gate", "up", "kind", "message"),
    [
        (torch.ones(2, 8), torch.ones(2, 4), "silu", r"gate is \(2, 8\) .* but up \(2, 4\)"),
        (torch.ones(2, 8), torch.ones(2, 8).half(), "silu", "but up .* torch.float16"),
        (
            torch.ones(2, 8),
            torch.ones(2, 8),
            "relu",
            "kind is 'relu', but has to be one of silu, gelu, gelu_tanh",
        ),
        (torch.ones(2, 8).int(), torch.ones(2, 8).int(), "silu", "gate is torch.int32"),
    ],
)
def test_what_does_not_fit_is_named(gate, up, kind, message):
    with pytest.raises(ValueError, match=message):
        gated_activation(gate, up, kind)
