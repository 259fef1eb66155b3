"""The optimiser against float32 AdamW and its own equations in float64, and its memory."""

import math
from importlib import import_module

import pytest
import torch
from edge_kernels import AdamW8bit
from edge_kernels.adamw8bit import update as module
from edge_kernels.adamw8bit.update import BLOCK
from edge_kernels.backend import on_triton
from numerics import DEVICE, ON_GPU
from torch import nn

INTERPRETED = on_triton(torch.zeros(1)) and not ON_GPU
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
RATE = 1e-2
OPTIMISER = import_module("edge_kernels.adamw8bit")


def factors(rank=5, into=70, out=83, dtype=torch.float32):
    """A, C and B of a layer in sizes that fill no block."""
    torch.manual_seed(0)
    shapes = ((rank, into), (rank, rank), (out, rank))
    return [nn.Parameter((torch.randn(shape) / 3).to(DEVICE, dtype)) for shape in shapes]


def feed(parameters, gradients):
    """A backward that gives each parameter its gradient; None for one that it does not reach."""
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    sum((p * g).sum() for p, g in pairs).backward()


def gradients_of(parameters, step, scale=1.0):
    torch.manual_seed(1000 + step)
    return [(torch.randn(p.shape) * scale).to(p.device, p.dtype) for p in parameters]


def fit(make, steps=30 if INTERPRETED else 120, spread=0.0):
    """Losses of a low-rank fit; spread: how many powers of e the columns of the input lie apart."""
    torch.manual_seed(2)
    x = (torch.randn(48, 70) * torch.exp(spread * torch.randn(70))).to(DEVICE)
    y = x @ (torch.randn(83, 70) / 70**0.5).to(DEVICE).T
    A, C, B = factors()
    optimiser, losses = make([A, C, B]), []
    for _ in range(steps):
        loss = (x @ A.T @ C.T @ B.T - y).square().mean()
        loss.backward()
        if isinstance(optimiser, torch.optim.Optimizer):
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def deviation(make, **kwargs):
    """Mean relative difference to float32 AdamW's losses."""
    truth = fit(lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1), **kwargs)
    return float(((fit(make, **kwargs) - truth) / truth).abs().mean())


def eight_bits(parameters):
    return AdamW8bit(parameters, lr=RATE, weight_decay=0.1)


# --- numbers


def check_first_step(dtype):
    """Moments are rounded after they were used, so the first step is AdamW's own but for the parameter's rounding."""
    parameters = factors(dtype=dtype)
    gradients = gradients_of(parameters, 0)
    truths = [p.detach().double().requires_grad_() for p in parameters]
    reference = torch.optim.AdamW(truths, lr=RATE, weight_decay=0.3)
    for truth, gradient in zip(truths, gradients, strict=True):
        truth.grad = gradient.double()
    reference.step()
    AdamW8bit(parameters, lr=RATE, weight_decay=0.3)
    feed(parameters, gradients)
    for p, truth in zip(parameters, truths, strict=True):
        assert ((p.double() - truth).norm() / truth.norm()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_step_is_that_of_adamw(dtype):
    check_first_step(dtype)


@pytest.mark.parametrize(
    "broken",
    [
        {"decay": 1.0},  # decay lost
        {"rate": RATE, "root": 1.0},  # bias correction lost
        {"rate": -RATE / 0.1},
        {"rest1": 0.0},  # dead gradient
    ],
)
def test_the_check_sees_a_broken_step(monkeypatch, broken):
    numbers = AdamW8bit._step_numbers
    monkeypatch.setattr(AdamW8bit, "_step_numbers", lambda *given: numbers(*given)._replace(**broken))
    with pytest.raises(AssertionError):
        check_first_step(torch.float32)


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_training_follows_adamw_in_float32(spread):
    assert deviation(eight_bits, spread=spread) < 0.02


def test_the_check_sees_moments_that_are_lost(monkeypatch):
    def forgetful(parameters):
        optimiser = eight_bits(parameters)
        update = optimiser._update

        def forgets(index, grad):
            update(index, grad)
            optimiser._scales[1, optimiser._rows[index]] = 0  # the scale of v

        optimiser._update = forgets
        return optimiser

    assert deviation(forgetful) > 0.02


def second_moments(optimiser, index):
    rows = optimiser._rows[index]
    code, scale = optimiser._second[rows], optimiser._scales[1, rows]
    return module._expand(code.int(), module.BITS2, module.LEAST2) * scale[:, None]


def first_moments(optimiser, index):
    rows = optimiser._rows[index]
    code, scale = optimiser._first[rows], optimiser._scales[0, rows]
    return module._expand(code.int().abs(), module.BITS1, module.LEAST1) * code.sign() * scale[:, None]


def test_moments_keep_their_relative_precision_over_four_decades():
    p = nn.Parameter(torch.zeros(2 * BLOCK, device=DEVICE))
    gradient = torch.logspace(-3.8, 0, 2 * BLOCK, device=DEVICE).roll(100)
    gradient[::2] *= -1
    optimiser = AdamW8bit([p])
    feed([p], [gradient])
    m, v = first_moments(optimiser, 0).view(-1), second_moments(optimiser, 0).view(-1)
    small = gradient.abs() < 5e-4  # near what m starts from its steps stay as they are
    assert float((m / (0.1 * gradient) - 1).abs()[~small].max()) < 0.07
    assert float((m - 0.1 * gradient).abs()[small].max()) < 0.1 * 5e-4 / 14
    assert float((v / (0.001 * gradient.square()) - 1).abs().max()) < 1 / 8


def test_a_small_second_moment_never_becomes_zero():
    p = nn.Parameter(torch.zeros(BLOCK, device=DEVICE))
    gradient = torch.logspace(-10, 0, BLOCK, device=DEVICE)
    optimiser = AdamW8bit([p], lr=RATE)
    for _ in range(3):
        feed([p], [gradient])
        assert (optimiser._second > 0).all()
    assert float(p.detach().abs().max()) < 3.3 * RATE


def lag(steps=1500):
    """How far the root of v is from float32's after gradients shrank thirtyfold, median of the ratio."""
    p = nn.Parameter(torch.zeros(2 * BLOCK, device=DEVICE))
    optimiser, truth = AdamW8bit([p]), torch.zeros(2 * BLOCK, device=DEVICE)
    for step in range(steps):
        torch.manual_seed(step)
        gradient = torch.randn(2 * BLOCK, device=DEVICE)
        gradient[1::2] *= max(math.exp(-step / 100), 1 / 30)  # its neighbours in the block do not shrink
        with torch.no_grad():
            optimiser._update(0, gradient)
            optimiser._apply()
        truth += 0.01 * (gradient.square() - truth)
    return float((second_moments(optimiser, 0).view(-1) / truth)[1::2].sqrt().median())


@pytest.mark.skipif(INTERPRETED, reason="the rounding to the nearest is put into the torch backend; long")
def test_second_moments_follow_gradients_that_shrink_and_to_the_nearest_would_not(monkeypatch):
    steps = 600
    monkeypatch.setattr(OPTIMISER, "BETAS", (0.9, 0.99))
    assert 0.9 < lag(steps) < 1.1
    half = 1 << module.CUT - 1
    to_nearest = module._round
    monkeypatch.setattr(module, "_round", lambda x, dice, bits, least: to_nearest(x, half, bits, least))
    assert lag(steps) > 1.5


@pytest.mark.skipif(
    not on_triton(torch.zeros(1, device=DEVICE)), reason="compares the Triton backend with torch's"
)
def test_both_backends_write_the_same_state():
    results = []
    for triton in (True, False):
        parameters = factors()
        optimiser = AdamW8bit(parameters, clip_norm=3.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OPTIMISER, "on_triton", lambda x, triton=triton: triton)
            for step in range(5):
                for index, gradient in enumerate(gradients_of(parameters, step)):
                    with torch.no_grad():
                        optimiser._update(index, gradient)
                        optimiser._apply()  # each by itself, as on a GPU: the random numbers go by the place in a piece
        results.append((parameters, optimiser))
    (ours, one), (torchs, two) = results
    for p, q in zip(ours, torchs, strict=True):
        assert torch.allclose(
            p, q, rtol=1e-4, atol=1e-4
        )  # a code may differ where the sums round differently
    for codes in ("_first", "_second"):
        difference = (getattr(one, codes).int() - getattr(two, codes).int()).abs()
        assert int(difference.max()) <= 1 and float(difference.float().mean()) < 0.01
    assert torch.allclose(one._scales, two._scales, rtol=1e-2)


def test_pieces_of_a_factor_are_stepped_as_the_whole(monkeypatch):
    results = []
    for piece in (module.PIECE, 2 * BLOCK):
        monkeypatch.setattr(module, "PIECE", piece)
        p = nn.Parameter(torch.zeros(5 * BLOCK + 77, device=DEVICE))
        optimiser = AdamW8bit([p])
        for step in range(3):
            feed([p], gradients_of([p], step))
        results.append([p, optimiser._first, optimiser._second, optimiser._scales])
    assert all(map(torch.equal, *results))


# --- the course of a step


def test_no_gradient_outlives_its_layer():
    parameters = factors()
    AdamW8bit(parameters)
    alive = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    before = [p.detach().clone() for p in parameters]
    feed(parameters, gradients_of(parameters, 0))
    assert alive == [0, 0, 0]
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_a_factor_that_backward_does_not_reach_is_left_alone():
    parameters = factors()
    optimiser = AdamW8bit(parameters, weight_decay=0.1)
    before = parameters[1].detach().clone()
    for step in range(3):
        a, _, b = gradients_of(parameters, step)
        feed(parameters, [a, None, b])
    assert torch.equal(parameters[1], before)
    assert not optimiser._scales[:, optimiser._rows[1]].any()
    assert optimiser.steps == [3, 0, 3]
    gradient = gradients_of(parameters, 3)[1]
    feed(parameters, [None, gradient, None])  # its own first step: full size
    assert torch.allclose(
        (parameters[1] - before * (1 - 1e-4)).abs(), torch.full_like(before, 1e-3), rtol=1e-3
    )


def test_the_rate_of_a_step_is_the_one_set_before_backward():
    parameters = factors()
    optimiser = AdamW8bit(parameters)
    before = parameters[0].detach().clone()
    optimiser.lr = 0.5
    feed(parameters, gradients_of(parameters, 0))
    assert torch.allclose((parameters[0] - before).abs(), torch.full_like(before, 0.5), rtol=1e-3)


def test_weight_decay_does_not_go_through_the_moments():
    parameters = factors()
    optimiser = AdamW8bit(parameters, lr=0.1, weight_decay=0.5)
    before = parameters[0].detach().clone()
    feed(parameters, [torch.zeros_like(p) for p in parameters])
    assert torch.allclose(parameters[0], 0.95 * before)
    assert not optimiser._scales.any()


def test_a_gradient_in_another_layout_is_read_in_order():
    p, q = (nn.Parameter(torch.zeros(30, 20, device=DEVICE)) for _ in range(2))
    first, second = AdamW8bit([p]), AdamW8bit([q])
    gradient = torch.randn(20, 30, device=DEVICE).T
    with torch.no_grad():
        for optimiser, grad in ((first, gradient), (second, gradient.contiguous())):
            optimiser._update(0, grad)
            optimiser.step()
    assert torch.equal(p, q)
    assert torch.equal(p.detach().sign(), -gradient.sign())


def test_a_gradient_that_is_not_finite_shows():
    parameters = factors()
    AdamW8bit(parameters)
    gradients = gradients_of(parameters, 0)
    gradients[0][2, 3] = math.nan
    feed(parameters, gradients)
    assert parameters[0][2, 3].isnan() and int(parameters[0].isnan().sum()) == 1


def clip_factors(scales, measured=True):
    """What each factor's gradient was multiplied with, in steps of gradients of such sizes, and each step's norm."""
    parameters = factors()
    optimiser, seen = AdamW8bit(parameters, clip_norm=1.0), []
    clip = optimiser._clipping.factor
    gradients = gradients_of(parameters, 0)
    if measured:
        with optimiser.measuring():
            feed(parameters, [scales[0] * gradient for gradient in gradients])
    optimiser._clipping.factor = lambda *given: seen.append(float(clip(*given))) or torch.tensor(seen[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", BLOCK)  # each factor by itself
        for scale in scales:
            feed(parameters, [scale * gradient for gradient in gradients])
    norm = float(torch.cat([gradient.double().flatten() for gradient in gradients]).norm())
    return [seen[i : i + 3] for i in range(0, len(seen), 3)], [scale * norm for scale in scales]


def check_clipping():
    """Gradients that keep their proportions are clipped to the norm, whatever their size was before, but for damping."""
    found, norms = clip_factors([2.0, 2.0, 2.0, 20.0, 20.0, 1.0])
    for step, factors_ in enumerate(found):
        last = norms[max(step - 1, 0)]
        low, high = sorted((last, norms[step]))
        for factor in factors_:
            assert low * 0.999 <= 1 / factor <= high * 1.001
        if low == high:
            assert factors_ == pytest.approx([1 / norms[step]] * 3, rel=1e-4)
    assert found[3][-1] == pytest.approx(
        1 / norms[3], rel=0.3
    )  # the last factor of a step ten times as large


def test_clipping_estimates_the_norm_from_the_part_that_has_passed():
    check_clipping()
    assert all(factor == 1 for step in clip_factors([0.001] * 3)[0] for factor in step)


def test_the_check_sees_a_norm_that_stands_still(monkeypatch):
    monkeypatch.setattr(OPTIMISER.Clipping, "end_step", lambda self: None)
    with pytest.raises(AssertionError):
        check_clipping()


def test_measuring_steps_nothing_and_keeps_no_gradient():
    parameters = factors()
    optimiser = AdamW8bit(parameters, clip_norm=1.0)
    before = [p.detach().clone() for p in parameters]
    with optimiser.measuring():
        feed(parameters, gradients_of(parameters, 0))
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(parameters, before, strict=True))
    assert optimiser.steps == [0, 0, 0]
    assert float(optimiser._clipping._squares[0]) > 0


def test_a_first_gradient_of_zero_does_not_stop_the_estimate():
    parameters = factors()
    optimiser = AdamW8bit(parameters, clip_norm=1.0)
    feed(parameters, [torch.zeros_like(p) for p in parameters])
    for step in range(3):
        feed(parameters, gradients_of(parameters, step))
    optimiser.step()
    assert float(optimiser._clipping._squares[0]) > 1


def test_a_sum_can_be_forgotten():
    parameters, twins = factors(), factors()
    optimiser = AdamW8bit(parameters)
    AdamW8bit(twins)
    with optimiser.accumulating():
        feed(parameters, gradients_of(parameters, 1))
    optimiser.forget()
    feed(parameters, gradients_of(parameters, 2))
    feed(twins, gradients_of(twins, 2))
    assert all(map(torch.equal, parameters, twins))


def test_micro_batches_add_up_to_one_step():
    ours, whole = factors(), factors()
    optimiser = AdamW8bit(ours, clip_norm=2.0)
    AdamW8bit(whole, clip_norm=2.0)
    for step in range(3):
        pieces = [gradients_of(ours, 10 * step + i) for i in range(3)]
        before = [p.detach().clone() for p in ours]
        with optimiser.accumulating():
            feed(ours, pieces[0])
            feed(ours, pieces[1])
        assert all(torch.equal(p, old) and p.grad is None for p, old in zip(ours, before, strict=True))
        feed(ours, pieces[2])
        feed(whole, [sum(parts) for parts in zip(*pieces, strict=True)])
    for p, q in zip(ours, whole, strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
    assert optimiser.steps == [3, 3, 3]


def test_a_sum_that_the_last_backward_does_not_reach_is_applied_by_step():
    parameters = factors()
    optimiser = AdamW8bit(parameters)
    before = parameters[1].detach().clone()
    a, c, b = gradients_of(parameters, 0)
    with optimiser.accumulating():
        feed(parameters, [a, c, b])
    feed(parameters, [a, None, b])
    assert torch.equal(parameters[1], before)
    optimiser.step()
    assert torch.allclose(parameters[1] - before, -1e-3 * c.sign(), rtol=1e-3)
    assert optimiser.steps == [1, 1, 1]
    assert not optimiser._sums.any() and not optimiser._summed


def test_after_close_a_backward_steps_nothing():
    parameters = factors()
    AdamW8bit(parameters).close()
    feed(parameters, gradients_of(parameters, 0))
    assert all(p.grad is not None for p in parameters)


# --- state


def state_bytes(optimiser):
    """Bytes of all tensors that the optimiser and its clipping hold, but for the number one."""
    values = [*vars(optimiser).values(), *vars(optimiser._clipping).values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor) and value.dim())


def test_state_is_two_bytes_a_value_and_the_scales():
    parameters = [
        nn.Parameter(torch.zeros(64, 256, device=DEVICE)),
        nn.Parameter(torch.zeros(16, 16, device=DEVICE)),
    ]
    optimiser = AdamW8bit(parameters)
    values = 64 * 256 + 16 * 16
    assert state_bytes(optimiser) == 2 * values + 8 * values // BLOCK + 8 + 8 * len(parameters)
    feed(parameters, [torch.ones_like(p) for p in parameters])
    assert state_bytes(optimiser) < 2.04 * values
    with optimiser.accumulating():
        feed(parameters, [torch.ones_like(p) for p in parameters])
    assert state_bytes(optimiser) < 6.04 * values


# --- bad input


def test_bad_parameters_are_refused():
    good = nn.Parameter(torch.zeros(4, 6))
    for bad, message in (
        ([], "at least one"),
        ([good, good], "twice"),
        ([good, nn.Parameter(torch.zeros(3, dtype=torch.float64))], r"parameters\[1\] is torch.float64"),
        ([nn.Parameter(torch.zeros(6, 4).T)], r"strides \(1, 4\)"),
        ([nn.Parameter(torch.zeros(3), requires_grad=False)], "requires_grad=False"),
        ([nn.Parameter(torch.zeros(0))], "not empty"),
        ([good * 1.0], "leaf"),
        ([good, nn.Parameter(torch.zeros(3, device="meta"))], "one device"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW8bit(bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"weight_decay": -0.1},
        {"clip_norm": 0.0},
    ],
)
def test_bad_numbers_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        AdamW8bit([nn.Parameter(torch.zeros(3))], **bad)
