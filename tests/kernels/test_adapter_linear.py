"""The operator against float64, what it keeps for backward, and what it refuses."""

import pytest
import torch
from edge_kernels import adapter_linear

SCALE = 2.5
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("y", "dx", "dA", "dC", "dB")


def plain(x, weight, A, C, B, scale, bias):
    z = x @ A.to(x.dtype).T
    z = z if C is None else z @ C.to(x.dtype).T
    y = x @ weight.T + scale * (z @ B.to(x.dtype).T)
    return y if bias is None else y + bias


def assert_as_good_as(ours, torchs, truth):
    """No error against float64 truth is over twice the worst of torch's own ops in the same dtype, plus one rounding."""
    limit = 2 * max(map(relative_error, torchs, truth)) + torch.finfo(ours[0].dtype).eps
    for one, two, true in zip(ours, torchs, truth, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        error = relative_error(one, true)
        assert error <= limit, f"relative error {error:.2e} over {limit:.2e}"


def relative_error(seen, truth):
    return float((seen.double() - truth).norm() / truth.norm())


def case(leading=(2, 5), into=48, out=32, rank=3, core=True, bias=True, dtype=torch.float32):
    """Inputs as a model has them: x and the frozen weight in one type, the factors in float32."""
    torch.manual_seed(0)
    draws = {
        "x": torch.randn(*leading, into).to(dtype),
        "weight": (torch.randn(out, into) / into**0.5).to(dtype),
        "A": torch.randn(rank, into) / into**0.5,
        "C": torch.randn(rank, rank) if core else None,
        "B": torch.randn(out, rank),
        "bias": torch.randn(out).to(dtype) if bias else None,
    }
    return draws, torch.randn(*leading, out).to(dtype)


def outcome(fn, draws, dy, kind=None):
    """y and the gradients of x, A, C, B; a gradient that did not come counts as zero."""
    taken = {name: None if value is None else value.to(kind or value.dtype) for name, value in draws.items()}
    leaves = {name: taken[name].clone().requires_grad_() for name in "xACB" if taken[name] is not None}
    y = fn(*(leaves.get(name, taken[name]) for name in ("x", "weight", "A", "C", "B")), SCALE, taken["bias"])
    y.backward(dy.to(y.dtype))
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
    return [y.detach(), *grads]


def check(fn, draws, dy):
    ours, torchs = outcome(fn, draws, dy), outcome(plain, draws, dy)
    truth = outcome(plain, draws, dy, torch.float64)
    assert_as_good_as(ours, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_match_float64(dtype, rank, core, bias):
    check(adapter_linear, *case(rank=rank, core=core, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3, 4), (1, 1, 1, 5)])
def test_any_leading_axes_do(dtype, leading):
    check(adapter_linear, *case(leading=leading, dtype=dtype))


@pytest.mark.parametrize(("into", "out"), [(1, 1), (5, 130), (130, 5)])
def test_any_widths_do(into, out):
    check(adapter_linear, *case(into=into, out=out))


def test_inputs_need_not_be_contiguous():
    draws, dy = case()
    draws["weight"] = draws["weight"].T.contiguous().T
    draws["x"] = draws["x"].transpose(0, 1).contiguous().transpose(0, 1)
    check(adapter_linear, draws, dy.transpose(0, 1).contiguous().transpose(0, 1))


def bent(tensor, how):
    """The tensor, whose gradient is bent on its way back."""
    tensor = tensor.clone()
    tensor.register_hook(how)
    return tensor


MUTANTS = {
    "the scale is missing": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A, C, B, 1.0, b),
    "the core is transposed": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A, C.T.contiguous(), B, s, b),
    "the core is left out": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A, None, B, s, b),
    "the bias is left out": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A, C, B, s, None),
    "x gets no gradient": lambda x, w, A, C, B, s, b: adapter_linear(x.detach(), w, A, C, B, s, b),
    "A gets no gradient": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A.detach(), C, B, s, b),
    "C gets no gradient": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A, C.detach(), B, s, b),
    "B gets no gradient": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A, C, B.detach(), s, b),
    "dA without scale": lambda x, w, A, C, B, s, b: adapter_linear(
        x, w, bent(A, lambda g: g / s), C, B, s, b
    ),
    "dC transposed": lambda x, w, A, C, B, s, b: adapter_linear(x, w, A, bent(C, lambda g: g.T), B, s, b),
    "dB without scale": lambda x, w, A, C, B, s, b: adapter_linear(
        x, w, A, C, bent(B, lambda g: g / s), s, b
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", MUTANTS)
def test_the_check_sees_a_fault(fault, dtype):
    with pytest.raises(AssertionError, match="relative error"):
        check(MUTANTS[fault], *case(dtype=dtype))


@pytest.mark.parametrize("core", [True, False])
def test_gradients_are_those_of_finite_differences(core):
    draws, _ = case(leading=(2, 2), into=4, out=3, rank=2, core=core)
    doubled = {name: None if value is None else value.double() for name, value in draws.items()}
    leaves = [doubled[name].requires_grad_() for name in "xACB" if doubled[name] is not None]

    def layer(x, A, *rest):
        C, B = rest if core else (None, *rest)
        return adapter_linear(x, doubled["weight"], A, C, B, SCALE, doubled["bias"])

    assert torch.autograd.gradcheck(layer, leaves)

    def with_a_fault(x, A, *rest):
        return layer(x, bent(A, lambda g: g / SCALE), *rest)

    assert not torch.autograd.gradcheck(with_a_fault, leaves, raise_exception=False)


def kept_shapes(fn, draws):
    """Shapes of the tensors that one forward pass keeps for backward."""
    leaves = {name: value.clone().requires_grad_() for name, value in draws.items() if name in "xACB"}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        fn(leaves["x"], draws["weight"], leaves["A"], leaves["C"], leaves["B"], SCALE, draws["bias"])
    return sorted(kept)


def test_x_is_the_only_activation_kept():
    draws, _ = case(leading=(2, 50), into=48, out=32, rank=3)
    factors_and_weight = [(3, 3), (3, 48), (32, 3), (32, 48)]
    assert kept_shapes(adapter_linear, draws) == sorted([*factors_and_weight, (100, 48)])
    assert (100, 3) in kept_shapes(plain, draws)  # x Aᵀ, which torch’s own ops keep: this check can fail


def test_a_frozen_factor_gets_no_gradient():
    draws, dy = case()
    B = draws["B"].clone().requires_grad_()
    adapter_linear(draws["x"], draws["weight"], draws["A"], draws["C"], B, SCALE).backward(dy)
    assert B.grad is not None and draws["A"].grad is None and draws["C"].grad is None


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.ones(2, 47), "x has rows of 47 but weight reads 48"),
        ("x", torch.ones(2, 48, dtype=torch.bfloat16), "x is torch.bfloat16 but weight is torch.float32"),
        ("A", torch.ones(3, 47), r"A is \(3, 47\) but has to be \(3, 48\)"),
        ("B", torch.ones(3, 32), r"B is \(3, 32\) but has to be \(32, 3\)"),
        ("C", torch.ones(3, 2), r"C is \(3, 2\) but has to be \(3, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(name, wrong, message):
    draws, _ = case()
    draws[name] = wrong
    with pytest.raises(ValueError, match=message):
        adapter_linear(*(draws[part] for part in ("x", "weight", "A", "C", "B")), SCALE, draws["bias"])
