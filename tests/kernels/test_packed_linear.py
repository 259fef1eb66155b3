"""Layers on a packed matrix against float64 on the expanded one, what they keep, and what they refuse."""

import weakref
from importlib import import_module

import pytest
import torch
from edge_kernels.adapter_linear import adapter_linear
from edge_kernels.backend import on_triton
from edge_kernels.packed_linear import packed_linear
from edge_kernels.quant import BLOCK, expand, pack
from numerics import DEVICE, ON_GPU, assert_as_good_as

SUBJECT = import_module("edge_kernels.packed_linear")
INTERPRETED = on_triton(torch.ones(1)) and not ON_GPU
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
SCALE = 2.5


def case(format, leading=(2, 5), into=72, out=40, rank=3, core=True, dtype=torch.float32):
    """A packed matrix whose rows are no whole blocks, and the rest as a model has it."""
    torch.manual_seed(0)
    draws = {
        "x": torch.randn(*leading, into).to(dtype),
        "A": torch.randn(rank, into) / into**0.5,
        "C": torch.randn(rank, rank) / rank**0.5 if core else None,
        "B": torch.randn(out, rank),
        "bias": torch.randn(out).to(dtype),
    }
    draws = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in draws.items()
    }
    draws["weight"] = pack(torch.randn(out, into) / into**0.5, format).to(DEVICE)
    return draws, torch.randn(*leading, out).to(DEVICE, dtype)


def plain(x, weight, A, C, B, scale, bias):
    """torch's own operations on the expanded matrix; A may be None."""
    y = x @ weight.T + bias
    if A is None:
        return y
    z = x @ A.to(x.dtype).T
    z = z if C is None else z @ C.to(x.dtype).T
    return y + scale * (z @ B.to(x.dtype).T)


def layer(x, weight, A, C, B, scale, bias):
    return packed_linear(x, weight, bias) if A is None else adapter_linear(x, weight, A, C, B, scale, bias)


def outcome(fn, draws, dy, kind=None, expanded=True):
    """y and the gradients of x, A, C, B; a gradient that did not come counts as zero."""
    taken = {
        name: value.to(kind or value.dtype)
        for name, value in draws.items()
        if isinstance(value, torch.Tensor)
    }
    leaves = {name: taken[name].clone().requires_grad_() for name in "xACB" if name in taken}
    weight = expand(draws["weight"], taken["x"].dtype) if expanded else draws["weight"]
    y = fn(leaves["x"], weight, *(leaves.get(name) for name in "ACB"), SCALE, taken["bias"])
    y.backward(dy.to(y.dtype))
    return [y.detach()] + [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()
    ]


def check(fn, draws, dy, reference=plain):
    ours, torchs = outcome(fn, draws, dy, expanded=False), outcome(reference, draws, dy)
    truth = outcome(reference, draws, dy, torch.float64)
    assert_as_good_as(ours, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", BLOCK)
@pytest.mark.parametrize("core", [True, False])
def test_adapter_on_a_packed_matrix_matches_float64(format, dtype, core):
    check(layer, *case(format, dtype=dtype, core=core))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", BLOCK)
def test_a_packed_layer_without_adapter_matches_float64(format, dtype):
    draws, dy = case(format, dtype=dtype)
    check(layer, draws | dict.fromkeys("ACB"), dy)


@pytest.mark.parametrize("rank", [1, 16, 17, 40])
def test_any_rank_does(rank):
    check(layer, *case("q4_0", rank=rank, core=rank > 1))  # a core of one number has no norm to average over


@pytest.mark.parametrize("leading", [(), (1,), (17,), (70,), (2, 3, 4)])
def test_any_number_of_rows_does(leading):
    check(layer, *case("q4_1", leading=leading))


@pytest.mark.parametrize(("into", "out"), [(1, 1), (5, 130), (130, 5)])
@pytest.mark.parametrize("format", ["q8_0", "nf4"])
def test_any_widths_do(format, into, out):
    check(layer, *case(format, into=into, out=out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_contraction_is_split_and_still_matches(dtype):
    check(layer, *case("q4_0", into=584, out=24, dtype=dtype))  # split forward
    check(layer, *case("q4_0", into=24, out=584, dtype=dtype))  # split backward


def test_the_same_input_gives_the_same_bits():
    draws, dy = case("q4_0", into=584, out=24)
    first, second = (outcome(layer, draws, dy, expanded=False) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_x_need_not_be_contiguous_and_may_have_another_consumer():
    draws, dy = case("q4_0")
    weight, bias = draws["weight"], draws["bias"]
    strided = draws["x"].transpose(0, 1).contiguous().transpose(0, 1)

    def twice(fn):
        return lambda x, *rest: fn(x, *rest) * (1 + x.sum(-1, keepdim=True))

    check(twice(layer), draws | {"x": strided}, dy, twice(plain))
    summed = [x.requires_grad_() for x in (draws["x"].clone(), draws["x"].clone())]
    packed_linear(summed[0], weight, bias).sum().backward()  # a gradient with strides of zero
    plain(summed[1], expand(weight), None, None, None, SCALE, bias).sum().backward()
    assert torch.allclose(summed[0].grad, summed[1].grad, atol=1e-4)


def test_no_rows_give_no_rows():
    draws, dy = case("q4_0", leading=(0,))
    y, dx, *_ = outcome(layer, draws, dy, expanded=False)
    assert y.shape == (0, 40) and dx.shape == (0, 72)


def bent(tensor, how):
    """The tensor, whose gradient is bent on its way back."""
    tensor = tensor.clone()
    tensor.register_hook(how)
    return tensor


def requanted(weight, how):
    return weight._replace(quants=how(weight.quants).contiguous())


def swapped(quants):
    return quants >> 4 | quants << 4


MUTANTS = {
    "the scale is missing": lambda x, w, A, C, B, s, b: layer(x, w, A, C, B, 1.0, b),
    "the core is transposed": lambda x, w, A, C, B, s, b: layer(x, w, A, C.T.contiguous(), B, s, b),
    "the adapter is left out": lambda x, w, A, C, B, s, b: layer(x, w, None, C, B, s, b),
    "the bias is left out": lambda x, w, A, C, B, s, b: layer(x, w, A, C, B, s, None),
    "the halves of a block change places": lambda x, w, A, C, B, s, b: layer(
        x, requanted(w, swapped), A, C, B, s, b
    ),
    "two rows change places": lambda x, w, A, C, B, s, b: layer(
        x, requanted(w, lambda q: q.flip(0)), A, C, B, s, b
    ),
    "x gets no gradient": lambda x, w, A, C, B, s, b: layer(x.detach(), w, A, C, B, s, b),
    "A gets no gradient": lambda x, w, A, C, B, s, b: layer(x, w, A.detach(), C, B, s, b),
    "C gets no gradient": lambda x, w, A, C, B, s, b: layer(x, w, A, C.detach(), B, s, b),
    "B gets no gradient": lambda x, w, A, C, B, s, b: layer(x, w, A, C, B.detach(), s, b),
    "dx without scale": lambda x, w, A, C, B, s, b: layer(bent(x, lambda g: g / s), w, A, C, B, s, b),
    "dA without scale": lambda x, w, A, C, B, s, b: layer(x, w, bent(A, lambda g: g / s), C, B, s, b),
    "dC transposed": lambda x, w, A, C, B, s, b: layer(x, w, A, bent(C, lambda g: g.T), B, s, b),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_check_sees_a_fault(fault):
    with pytest.raises(AssertionError, match="relative error"):
        check(MUTANTS[fault], *case("q4_0"))


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="float64 is the torch backend's")
def test_gradients_are_those_of_finite_differences():
    draws, _ = case("q4_1", leading=(2,), into=4, out=3, rank=2)
    leaves = [draws[name].double().requires_grad_() for name in "xACB"]

    def ours(x, A, C, B):
        return adapter_linear(x, draws["weight"], A, C, B, SCALE)

    assert torch.autograd.gradcheck(ours, leaves)
    faulty = lambda x, A, C, B: ours(x, bent(A, lambda g: g / SCALE), C, B)  # noqa: E731
    assert not torch.autograd.gradcheck(faulty, leaves, raise_exception=False)


def kept_shapes(fn, trains):
    """Shapes of the activations and factors that a forward pass keeps beside the packed matrix."""
    draws, _ = case("q4_0", leading=(100,))
    kept, frozen = [], {part.data_ptr() for part in draws["weight"].parts if part is not None}
    leaves = {name: draws[name].clone().requires_grad_(name in trains) for name in "xACB"}
    weight = draws["weight"] if fn is layer else expand(draws["weight"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fn(leaves["x"], weight, *(leaves[name] for name in "ACB"), SCALE, draws["bias"])
    return sorted(tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in frozen)


FACTORS = [(3, 3), (3, 72), (40, 3)]


@pytest.mark.parametrize(
    ("trains", "activations"), [("xACB", [(100, 72)]), ("xCB", [(100, 3)]), ("xB", [(100, 3)]), ("x", [])]
)
def test_no_more_is_kept_than_the_gradients_need(trains, activations):
    assert kept_shapes(layer, trains) == sorted([*FACTORS, *activations])
    assert (72, 40) in kept_shapes(plain, trains)  # the expanded matrix: this check can fail


@pytest.mark.parametrize("trains", ["xCB", "xB", "x", "C", "A"])
def test_frozen_factors_leave_the_other_gradients_as_they_are(trains):
    draws, dy = case("q4_0")
    seen = {}
    for which in ("xACB", trains):
        leaves = {name: draws[name].clone().requires_grad_(name in which) for name in "xACB"}
        adapter_linear(leaves["x"], draws["weight"], leaves["A"], leaves["C"], leaves["B"], SCALE).backward(
            dy
        )
        seen[which] = {name: leaf.grad for name, leaf in leaves.items()}
    for name in "xACB":
        ours = seen[trains][name]
        assert (ours is None) == (name not in trains)
        assert ours is None or torch.allclose(ours, seen["xACB"][name], atol=1e-5)


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="kernels expand in their tiles")
def test_the_expanded_matrix_is_gone_after_each_direction(monkeypatch):
    expanded = []

    def watched(*arguments):
        matrix = expand(*arguments)
        expanded.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(SUBJECT, "expand", watched)
    draws, dy = case("q4_0")
    x = draws["x"].requires_grad_()
    y = adapter_linear(x, draws["weight"], draws["A"], draws["C"], draws["B"], SCALE)
    assert [matrix() for matrix in expanded] == [None]
    y.backward(dy)
    assert [matrix() for matrix in expanded] == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"x": torch.ones(2, 47, device=DEVICE)}, "x has rows of 47 but .* reads 72"),
        (lambda d: {"x": torch.ones(2, 72, dtype=torch.int32, device=DEVICE)}, "x is torch.int32"),
        (lambda d: {"bias": torch.ones(39, device=DEVICE)}, r"bias is \(39,\) but has to be \(40,\)"),
        (lambda d: {"weight": requanted(d["weight"], lambda q: q[:-1])}, r"\.quants is .*39, 48"),
        (
            lambda d: {"weight": d["weight"]._replace(scales=d["weight"].scales.float())},
            r"\.scales is .*float32",
        ),
        (lambda d: {"weight": d["weight"]._replace(mins=d["weight"].scales)}, r"\.mins is"),
        (lambda d: {"weight": d["weight"]._replace(shape=(40, 200))}, r"\.quants is .*q4_0 of 40 x 200"),
        (lambda d: {"weight": d["weight"]._replace(format="q5_0")}, r"\.format is 'q5_0'"),
    ],
)
@pytest.mark.parametrize("adapted", [True, False])
def test_what_does_not_fit_is_named(adapted, change, message):
    draws, _ = case("q4_0")
    draws |= change(draws) | ({} if adapted else dict.fromkeys("ACB"))
    with pytest.raises(ValueError, match=message):
        layer(draws["x"], draws["weight"], *(draws[name] for name in "ACB"), SCALE, draws["bias"])


@pytest.mark.parametrize("rank", [0, 257])
def test_a_rank_out_of_range_is_refused(rank):
    draws, _ = case("q4_0", rank=1)
    A, B = torch.ones(rank, 72, device=DEVICE), torch.ones(40, rank, device=DEVICE)
    with pytest.raises(ValueError, match=f"rank {rank}, but it has to be 1 to 256"):
        adapter_linear(draws["x"], draws["weight"], A, None, B, SCALE)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    draws, _ = case("q4_0")
    with pytest.raises(ValueError, match="has to be finite"):
        adapter_linear(draws["x"], draws["weight"], draws["A"], None, draws["B"], scale)
