"""The loss and its gradient against float64, on each path with pieces of any size; the whole logits never exist."""

import os
from functools import partial
from importlib import import_module

import pytest
import torch
from edge_kernels import LanguageHead, linear_cross_entropy, quant
from edge_kernels.backend import on_triton
from edge_kernels.linear_cross_entropy import IGNORED
from edge_kernels.quant import BLOCK, Packed, expand, pack
from numerics import DEVICE, ON_GPU, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

SUBJECT, CHUNKS, SWEEP = (
    import_module(f"edge_kernels.linear_cross_entropy{part}") for part in ("", ".chunks", ".sweep")
)
INTERPRETED = "TRITON_INTERPRET" in os.environ  # it gets bfloat16 wrong
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED and not ON_GPU else [torch.bfloat16])
PATHS = ["chunks", "tiles"] if on_triton(torch.ones(1, device=DEVICE)) else ["sweep"]
VOCABULARY, WIDTH = 50, 24


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    chosen = getattr(SUBJECT, request.param)
    monkeypatch.setattr(SUBJECT, "_path", lambda *_: chosen)
    return request.param


def plain(hidden, head, labels, chunk_bytes=None):
    weight = head.weight
    if isinstance(weight, Packed):
        weight = expand(weight, torch.float32).to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight, head.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def assert_as_good_as(ours, torchs, truth):
    """No error against float64 truth is over twice the worst of torch's own ops in the same dtype, plus one rounding."""
    limit = 2 * max(map(relative_error, torchs, truth)) + torch.finfo(ours[1].dtype).eps
    for one, two, true in zip(ours, torchs, truth, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        error = relative_error(one, true)
        assert error <= limit, f"relative error {error:.2e} over {limit:.2e}"


def case(shape=(3, 7), dtype=torch.float32, ignored=0.4, vocabulary=VOCABULARY, width=WIDTH):
    torch.manual_seed(0)
    hidden, head = torch.randn(*shape, width), torch.randn(vocabulary, width)
    labels = torch.randint(vocabulary, shape)
    labels[torch.rand(shape) < ignored] = IGNORED
    return hidden.to(DEVICE, dtype), head.to(DEVICE, dtype), labels.to(DEVICE)


def outcome(fn, hidden, head, labels, **more):
    """The loss and the gradient of hidden; the loss is scaled after it is made."""
    leaf = hidden.clone().requires_grad_()
    loss = fn(leaf, head, labels, **more)
    (3 * loss).backward()
    return [loss.detach(), leaf.grad]


def check(fn, hidden, weight, labels, softcap=None, bias=None, **more):
    head = LanguageHead(weight, bias, softcap)
    ours = outcome(fn, hidden, head, labels, **more)
    torchs = outcome(plain, hidden, head, labels, **more)
    truth = outcome(plain, hidden.double(), exact(head), labels, **more)
    assert_as_good_as(ours, torchs, truth)


def exact(head):
    weight = expand(head.weight) if isinstance(head.weight, Packed) else head.weight
    return LanguageHead(weight.double(), None if head.bias is None else head.bias.double(), head.softcap)


def drawn_bias(vocabulary, dtype):
    """As large as the logits that it is added to."""
    return (3 * torch.randn(vocabulary)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tokens_a_chunk", [1, 3, 4, 10**6])
def test_loss_and_gradient_match_float64_whatever_the_chunks(path, dtype, softcap, tokens_a_chunk):
    hidden, head, labels = case(dtype=dtype)
    kept = int((labels != IGNORED).sum())
    assert tokens_a_chunk == 1 or kept % tokens_a_chunk  # the last chunk is a smaller one
    check(
        linear_cross_entropy,
        hidden,
        head,
        labels,
        softcap,
        chunk_bytes=dtype.itemsize * VOCABULARY * tokens_a_chunk,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_bias_is_part_of_the_logits(path, dtype, softcap):
    """In more than one tile and in more than one piece of the vocabulary."""
    hidden, head, labels = case((23,), dtype, vocabulary=413)
    bias, chunk_bytes = drawn_bias(413, dtype), dtype.itemsize * 413 * 4
    check(linear_cross_entropy, hidden, head, labels, softcap, bias, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", BLOCK)
def test_a_packed_head_gives_what_its_expansion_gives(path, format, dtype, monkeypatch):
    monkeypatch.setattr(quant, "EXPANDED_BYTES", 1)  # the fewest rows at once
    hidden, head, labels = case(dtype=dtype, vocabulary=600, width=70)
    packed, bias, chunk_bytes = pack(head, format), drawn_bias(600, dtype), dtype.itemsize * 600 * 4
    check(linear_cross_entropy, hidden, packed, labels, 5.0, bias, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_and_odd_sizes_match_float64(path, dtype):
    hidden, head, labels = case((69,), dtype, vocabulary=413, width=83)
    check(linear_cross_entropy, hidden, head, labels, chunk_bytes=dtype.itemsize * 413 * 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sure_tokens_keep_the_precision_of_their_small_gradients(path, dtype):
    """Their own probability is rounded to 1 in 16 bits, and most tiles' gradients are below the type's resolution."""
    hidden, head, labels = case((12,), dtype, vocabulary=413, ignored=0)
    hidden = hidden + (0.5 * head[labels]).to(dtype)
    check(linear_cross_entropy, hidden, head, labels)


def test_even_probabilities_count_however_small_each_is(path):
    """A vocabulary whose every probability is below what a tile may leave out: their sum is not."""
    dtype = DTYPES[-1]
    hidden, head, labels = case((3,), dtype, vocabulary=9000, width=16, ignored=0)
    check(linear_cross_entropy, hidden * 1e-3, head + 1, labels)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3, 4)])
def test_any_leading_axes_do(path, shape):
    check(linear_cross_entropy, *case(shape, ignored=0.0))


def test_what_is_not_contiguous_does(path):
    hidden, head, labels = case((6, 4))
    check(
        lambda h, *more, **named: linear_cross_entropy(h.mT.contiguous().mT, *more, **named),
        hidden,
        head,
        labels,
    )
    wide = torch.stack((labels, labels), -1)[..., 0]
    check(linear_cross_entropy, hidden, head if path == "tiles" else head.T.contiguous().T, wide)


def test_what_else_reads_hidden_keeps_its_share_of_the_gradient(path):
    def shared(hidden, head, labels, fn=linear_cross_entropy):
        return fn(hidden, head, labels) + hidden.float().square().sum() / 100

    hidden, weight, labels = case()
    head = LanguageHead(weight)
    ours = outcome(shared, hidden, head, labels)
    other = partial(shared, fn=plain)
    truth = outcome(
        lambda h, w, y: plain(h, w, y) + h.square().sum() / 100, hidden.double(), exact(head), labels
    )
    assert_as_good_as(ours, outcome(other, hidden, head, labels), truth)


def test_a_chunk_smaller_than_one_row_of_logits_takes_one_token(path):
    check(linear_cross_entropy, *case(), chunk_bytes=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_every_label_ignored_loss_and_gradient_are_zero(dtype):
    hidden, head, labels = case(dtype=dtype, ignored=1.1)
    loss, gradient = outcome(linear_cross_entropy, hidden, LanguageHead(head), labels)
    assert loss == 0
    assert not gradient.any()


def test_ignored_tokens_change_nothing_whatever_they_hold(path):
    hidden, head, labels = case()
    loss, _ = outcome(linear_cross_entropy, hidden, LanguageHead(head), labels)
    hidden[labels == IGNORED] = float("nan")
    again, gradient = outcome(linear_cross_entropy, hidden, LanguageHead(head), labels)
    assert loss == again
    assert torch.equal(gradient[labels == IGNORED], torch.zeros_like(gradient[labels == IGNORED]))


def test_without_a_hidden_that_requires_a_gradient_there_is_none(path):
    hidden, head, labels = case()
    assert not linear_cross_entropy(hidden, LanguageHead(head), labels).requires_grad


@pytest.mark.skipif("chunks" not in PATHS, reason="chunks are Triton's")
def test_chunks_without_grad_mode_make_the_loss_alone(monkeypatch):
    monkeypatch.setattr(SUBJECT, "_path", lambda *_: SUBJECT.chunks)
    hidden, head, labels = case()
    head = LanguageHead(head)
    loss = linear_cross_entropy(hidden.requires_grad_(), head, labels)
    monkeypatch.setattr(CHUNKS, "_product", None)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, head, labels), loss)


def test_a_sweep_without_grad_mode_makes_no_gradient(monkeypatch):
    sweep, gradients = SWEEP._sweep, []
    monkeypatch.setattr(SUBJECT, "_path", lambda *_: SUBJECT.sweep)
    monkeypatch.setattr(SWEEP, "_sweep", lambda *given: gradients.append(given[-1]) or sweep(*given))
    hidden, head, labels = case()
    head = LanguageHead(head)
    loss = linear_cross_entropy(hidden.requires_grad_(), head, labels)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, head, labels), loss)
    assert gradients[0] is not None
    assert gradients[1:] == [None]


def count_ignored(hidden, head, labels, **more):
    return linear_cross_entropy(hidden, head, labels, **more) * (labels != IGNORED).sum() / labels.numel()


def learn_ignored(hidden, head, labels, **more):
    return linear_cross_entropy(hidden, head, labels.clamp(min=0), **more)


def no_gradient(hidden, head, labels, **more):
    return linear_cross_entropy(hidden.detach(), head, labels, **more) + 0 * hidden.sum()


def no_softcap(hidden, head, labels, **more):
    return linear_cross_entropy(hidden, head._replace(softcap=None), labels, **more)


def no_bias(hidden, head, labels, **more):
    return linear_cross_entropy(hidden, head._replace(bias=None), labels, **more)


def forgets_what_came_back(hidden, head, labels, **more):
    loss = linear_cross_entropy(hidden, head, labels, **more)
    loss.register_hook(torch.ones_like)
    return loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fault", [count_ignored, learn_ignored, no_gradient, no_softcap, no_bias, forgets_what_came_back]
)
def test_the_check_sees_a_fault(path, fault, dtype):
    with pytest.raises(AssertionError, match="relative error"):
        check(fault, *case(dtype=dtype), 5.0, drawn_bias(VOCABULARY, dtype))


def test_the_gradient_is_that_of_finite_differences(path):
    """The operator counts in float32, so the steps are wider than gradcheck's own."""
    hidden, weight, labels = case((2, 2), width=4, ignored=0.3)
    head = LanguageHead(weight, drawn_bias(VOCABULARY, weight.dtype), 5.0)
    leaf = hidden.mul(0.1).double().requires_grad_()

    def agrees(fn):
        return torch.autograd.gradcheck(
            lambda h: fn(h.float(), head, labels),
            (leaf,),
            eps=1e-3,
            atol=2e-3,
            rtol=1e-2,
            raise_exception=False,
        )

    assert agrees(linear_cross_entropy)
    assert not agrees(no_gradient)


@pytest.mark.skipif(not on_triton(torch.ones(1, device=DEVICE)), reason="tiles are Triton's")
@pytest.mark.parametrize(("rows", "tokens", "tiles"), [(64, 500, False), (63, 500, True), (63, 56, False)])
def test_a_dense_head_goes_by_tiles_where_chunks_would_be_many_and_small(rows, tokens, tiles):
    hidden, head, _ = case((tokens,), torch.float16)
    assert (SUBJECT._path(hidden, head, tokens, 2 * VOCABULARY * rows) is SUBJECT.tiles) is tiles
    assert SUBJECT._path(hidden, head.T.contiguous().T, tokens, 2 * VOCABULARY * rows) is SUBJECT.chunks
    assert SUBJECT._path(hidden, pack(head, "q8_0"), tokens, 2 * VOCABULARY * rows) is SUBJECT.tiles
    assert SUBJECT._path(hidden.float(), pack(head, "q8_0"), tokens, 2 * VOCABULARY * rows) is SUBJECT.chunks


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="kernels expand a packed head in their tiles")
def test_a_packed_head_is_expanded_once(monkeypatch):
    expanded = []
    monkeypatch.setattr(
        quant, "expand", lambda packed, **more: expanded.append(packed.shape[0]) or expand(packed, **more)
    )
    monkeypatch.setattr(quant, "EXPANDED_BYTES", 1)
    hidden, head, labels = case((40,), vocabulary=600)
    check(linear_cross_entropy, hidden, pack(head, "q8_0"), labels, chunk_bytes=40 * 4 * 256)
    assert sum(expanded) == 600


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any one tensor has which an operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point():  # the interpreter copies bytes
            self.numbers = max(self.numbers, made.numel())
        return made


def largest(fn, hidden, weight, labels, **more):
    with LargestTensor() as seen:
        outcome(fn, hidden, LanguageHead(weight), labels, **more)
    return seen.numbers


def test_the_logits_of_the_whole_batch_never_exist(path):
    given = case((100,), ignored=0.0)
    chunk_bytes = 4 * VOCABULARY * 8  # the batch's hidden states are 2400 numbers, its logits would be 5000
    assert largest(linear_cross_entropy, *given, chunk_bytes=chunk_bytes) == given[0].numel()
    assert largest(plain, *given) == 100 * VOCABULARY


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="kernels expand a packed head in their tiles")
def test_a_packed_head_is_never_expanded_whole(path, monkeypatch):
    monkeypatch.setattr(quant, "EXPANDED_BYTES", 4 * 256 * 64)
    hidden, head, labels = case((8,), vocabulary=4096, width=64)
    packed = pack(head, "nf4")
    kept = 4 * 4096  # the byte budget below, which is less than the head's 262 144 numbers
    assert largest(linear_cross_entropy, hidden, packed, labels, chunk_bytes=4 * kept) <= kept
    assert largest(plain, hidden, packed, labels) == head.numel()


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
        linear_cross_entropy(torch.ones(hidden), LanguageHead(torch.ones(head)), labels)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"hidden": torch.ones(2, 4).double()}, "hidden is torch.float64 but has to be float32"),
        ({"weight": torch.ones(9, 4).half()}, "hidden is torch.float32 but head is torch.float16"),
        ({"bias": torch.ones(8)}, r"bias is \(8,\) of torch.float32 but has to be \(9,\) of torch.float32"),
        ({"bias": torch.ones(9).half()}, r"bias is \(9,\) of torch.float16 but"),
        ({"labels": torch.zeros(2)}, "labels are torch.float32 but have to be int64"),
        (
            {"weight": pack(torch.ones(9, 4), "q8_0")._replace(shape=(10, 4))},
            r"head.quants is .* but q8_0 of 10 x 4 needs",
        ),
        ({"softcap": 0.0}, "softcap is 0.0 but has to be above 0"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0 but has to be above 0"),
    ],
)
def test_what_is_of_no_use_is_named(named, message):
    part = {"weight": torch.ones(9, 4), **named}
    head = LanguageHead(**{name: part.pop(name) for name in LanguageHead._fields if name in part})
    given = {"hidden": torch.ones(2, 4), "labels": torch.zeros(2).long(), **part}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(head=head, **given)
