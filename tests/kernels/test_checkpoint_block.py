"""A block that runs again in backward against the same block plain: gradients, what is kept, and random numbers."""

import gc
import weakref
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import pytest
import torch
from edge_kernels.adamw8bit import AdamW8bit
from edge_kernels.checkpoint_block import Kept, checkpoint_block, expand_rows, quantise_rows
from numerics import DEVICE, assert_as_good_as, relative_error
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

SUBJECT = import_module("edge_kernels.checkpoint_block")
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=8,
)
SHAPE = (2, 7, 32)


def plain(block, hidden, *args, keep="input", **kwargs):
    return block(hidden, *args, **kwargs)


def llama(dropout=0.0, dtype=torch.float32):
    """A decoder layer whose attention output and MLP train, and the arguments that a model gives it."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIG.to_dict(), "attention_dropout": dropout})
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, 0).to(DEVICE, dtype).train()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("norm" not in name and "q_proj" not in name)
    hidden = torch.randn(SHAPE).to(DEVICE, dtype)
    positions = torch.arange(SHAPE[1], device=DEVICE)[None]
    embeddings = LlamaRotaryEmbedding(config).to(DEVICE)(hidden, positions)
    mask = torch.zeros(2, 1, SHAPE[1], SHAPE[1], device=DEVICE, dtype=dtype)
    mask += torch.full_like(mask, -1e4).triu(1)
    mask[1, ..., :2] = -1e4  # padding
    return block, hidden, {"attention_mask": mask, "position_embeddings": embeddings}


def outcome(run, blocks, hidden, kwargs, seed=7):
    """y and the gradients of hidden and of all that trains, where hidden has a second consumer."""
    for block in blocks:
        block.zero_grad()
    leaf = hidden.clone().requires_grad_()
    torch.manual_seed(seed)
    y = x = leaf * 1.0
    for block in blocks:
        y = run(block, y, **kwargs)
    torch.manual_seed(seed + 1)
    (y.sin().sum() + x.square().sum()).backward()
    trained = [p for block in blocks for p in block.parameters() if p.requires_grad]
    return [
        y.detach(),
        leaf.grad,
        *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained),
    ]


def check(run, blocks, hidden, kwargs):
    seen, expected = outcome(run, blocks, hidden, kwargs), outcome(plain, blocks, hidden, kwargs)
    assert_as_good_as(seen, expected, [value.double() for value in expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_block_gets_the_gradients_of_the_plain_one(dtype):
    block, hidden, kwargs = llama(dtype=dtype)
    check(checkpoint_block, [block], hidden, kwargs)


def test_two_blocks_in_a_row():
    first, hidden, kwargs = llama()
    second = llama()[0]
    nn.init.normal_(second.mlp.up_proj.weight, std=0.1)
    check(checkpoint_block, [first, second], hidden, kwargs)


@contextmanager
def watched():
    """What blocks keep for backward, random states too."""
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("keep", ["input", "int8"])
def test_blocks_that_keep_in_one_piece_of_memory(keep):
    blocks, hidden, kwargs = [llama()[0] for _ in range(3)], *llama()[1:]
    run = partial(checkpoint_block, keep=keep, storage=Kept(3))
    seen, expected = (
        outcome(run, blocks, hidden, kwargs),
        outcome(partial(run, storage=None), blocks, hidden, kwargs),
    )
    assert all(map(torch.equal, seen, expected))
    for place, pieces in ((Kept(3), 1), (None, 3)):
        with watched() as kept:
            y = hidden.clone().requires_grad_()
            for block in blocks:
                y = run(block, y, storage=place, **kwargs)
        of_a_block = len(kept) // 3
        for parts in (kept[kind::of_a_block] for kind in range(of_a_block)):
            assert len({part.untyped_storage().data_ptr() for part in parts}) == pieces
            assert len({part.data_ptr() for part in parts}) == 3


def test_dropout_is_the_same_again():
    block, hidden, kwargs = llama(dropout=0.4)
    other = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.3)).to(DEVICE)
    check(checkpoint_block, [block], hidden, kwargs)
    check(checkpoint_block, [other, other], hidden, {})


def test_the_check_sees_dropout_that_is_drawn_again(monkeypatch):
    block, hidden, kwargs = llama(dropout=0.4)
    monkeypatch.setattr(torch, "set_rng_state", lambda *_: None)
    with pytest.raises(AssertionError, match="relative error"):
        check(checkpoint_block, [block], hidden, kwargs)


def test_backward_leaves_the_random_numbers_as_they_are():
    block, hidden, kwargs = llama(dropout=0.4)
    y = checkpoint_block(block, hidden, **kwargs)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_state_is_kept_only_where_something_was_drawn():
    block, hidden, kwargs = llama(dropout=0.4)
    for training, tensors in ((True, 2), (False, 1)):
        with watched() as kept:
            checkpoint_block(block.train(training), hidden, **kwargs)
        assert len(kept) == tensors


@pytest.mark.parametrize(
    "broken",
    [
        lambda block, hidden, **kwargs: checkpoint_block(block, hidden.detach(), **kwargs),  # no way back
        lambda block, hidden, **kwargs: checkpoint_block(partial(dead, block), hidden, **kwargs),
        lambda block, hidden, **kwargs: checkpoint_block(Forgetful(block), hidden, **kwargs),
    ],
)
def test_the_check_sees_what_is_lost(broken):
    block, hidden, kwargs = llama()
    with pytest.raises(AssertionError, match="relative error"):
        check(broken, [block], hidden, kwargs)


def dead(block, hidden, **kwargs):
    return hidden + (block(hidden, **kwargs) - hidden).detach()


class Forgetful:
    """Drops the mask in the second run."""

    def __init__(self, block):
        self.block, self.runs = block, 0

    def __call__(self, hidden, attention_mask, **kwargs):
        self.runs += 1
        other = torch.zeros_like(attention_mask)
        return self.block(hidden, attention_mask=attention_mask if self.runs == 1 else other, **kwargs)


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    linear = nn.Linear(3, 3).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: checkpoint_block(lambda h: linear(h).tanh() * h, x), x)


# --- int8


def test_int8_leaves_the_output_exact_and_the_gradients_near():
    block, hidden, kwargs = llama()
    seen = outcome(partial(checkpoint_block, keep="int8"), [block], hidden, kwargs)
    expected = outcome(plain, [block], hidden, kwargs)
    assert torch.equal(seen[0], expected[0])
    for one, two in zip(seen[1:], expected[1:], strict=True):
        assert 0 < relative_error(one, two.double()) < 0.02


def test_int8_rounds_to_half_a_step_of_the_rows_largest_and_gives_the_gradient_there():
    torch.manual_seed(0)
    linear = nn.Linear(32, 4).to(DEVICE)
    hidden = torch.randn(SHAPE, device=DEVICE) * torch.logspace(-3, 3, 7, device=DEVICE)[:, None]
    kept = expand_rows(*quantise_rows(hidden), torch.float32)
    assert ((kept - hidden).abs() <= hidden.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    checkpoint_block(linear, hidden, keep="int8").sum().backward()
    assert torch.allclose(linear.weight.grad[0], kept.sum((0, 1)), rtol=1e-4)


# --- what is kept


def test_it_keeps_its_input_or_a_byte_a_value():
    block, hidden, kwargs = llama()
    values, rows = hidden.numel(), hidden.numel() // hidden.shape[-1]
    for keep, size in (("input", 4 * values), ("int8", values + 4 * rows)):
        with watched() as kept:
            checkpoint_block(block, hidden * 1, keep=keep, **kwargs)
        assert sum(part.nbytes for part in kept) == size


def test_nothing_of_its_graph_stays_between_the_runs():
    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    alive = []
    y = checkpoint_block(lambda x: Node.apply(x).sin(), torch.ones(SHAPE, device=DEVICE, requires_grad=True))
    assert alive[0]() is None
    y.sum().backward()
    assert len(alive) == 2 and alive[1]() is None


def test_backward_a_second_time_runs_the_block_again():
    block, hidden, kwargs = llama()
    leaf = hidden.requires_grad_()
    y = checkpoint_block(block, leaf, **kwargs).sum()
    y.backward(retain_graph=True)
    once = leaf.grad.clone()
    y.backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_a_product_that_nothing_reads_is_not_made_again(monkeypatch):
    made = []
    layer = import_module("edge_kernels.adapter_linear")
    product = layer.product
    monkeypatch.setattr(layer, "product", lambda *a, **k: made.append(k["forward"]) or product(*a, **k))
    torch.manual_seed(0)
    weights = [torch.randn(32, 32, device=DEVICE) for _ in range(2)]
    factors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in [(4, 32), (32, 4)] * 2]

    def block(x):
        x = layer.adapter_linear(x, weights[0], factors[0], None, factors[1], 0.5).tanh()
        return layer.adapter_linear(x, weights[1], factors[2], None, factors[3], 0.5)

    gradients = []
    for run in (plain, checkpoint_block):
        for factor in factors:
            factor.grad = None
        leaf = torch.ones(SHAPE, device=DEVICE, requires_grad=True)
        made.clear()
        run(block, leaf).sin().sum().backward()
        gradients.append([leaf.grad, *(factor.grad for factor in factors)])
    assert made == [True, True, True, False, False]  # one of the second run's two is left out
    assert all(map(torch.equal, *gradients))


def test_a_block_that_does_something_else_again_is_found_out():
    linear, runs = nn.Linear(32, 32).to(DEVICE), []

    def block(x):
        runs.append(1)
        return linear(x).tanh() if len(runs) == 1 else linear(x)

    y = checkpoint_block(block, torch.ones(SHAPE, device=DEVICE))
    with pytest.raises(RuntimeError, match=r"kept \d tensors when it first ran but \d when it ran again"):
        y.sum().backward()


@pytest.mark.parametrize("keep", ["input", "int8"])
def test_nothing_of_the_first_run_stays(keep):
    block, hidden, kwargs = llama()
    alive = []
    block.mlp.act_fn.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    y = checkpoint_block(block, hidden * 1, keep=keep, **kwargs)
    gc.collect()
    assert alive[0]() is None
    y.sum().backward()
    gc.collect()
    assert len(alive) == 2 and alive[1]() is None


def test_int8_does_not_hold_the_input():
    block, hidden, kwargs = llama()
    inner = hidden * 1
    seen = weakref.ref(inner)
    y = checkpoint_block(block, inner, keep="int8", **kwargs)
    del inner
    assert seen() is None
    y.sum().backward()


# --- in a training step


def test_parameters_train_below_an_input_without_gradient():
    block, hidden, kwargs = llama()
    checkpoint_block(block, hidden, **kwargs).sum().backward()
    seen = [p.grad.clone() for p in block.parameters() if p.requires_grad]
    block.zero_grad()
    block(hidden, **kwargs).sum().backward()
    assert all(map(torch.equal, seen, [p.grad for p in block.parameters() if p.requires_grad]))


@pytest.fixture
def one_by_one(monkeypatch):
    """Factors step by themselves: in which order those of a block have their gradients, and which wait together, may differ."""
    monkeypatch.setattr(import_module("edge_kernels.adamw8bit.update"), "PIECE", 256)


def test_a_step_inside_backward_is_that_of_plain_blocks(one_by_one):
    trained = []
    for run in (plain, checkpoint_block):
        first, hidden, kwargs = llama()
        second = llama()[0]
        parameters = [p for block in (first, second) for p in block.parameters() if p.requires_grad]
        AdamW8bit(parameters, lr=1e-2)
        for _ in range(3):
            run(second, run(first, hidden, **kwargs), **kwargs).square().mean().backward()
            assert all(p.grad is None for p in parameters)
        trained.append(parameters)
    for p, q in zip(*trained, strict=True):
        assert torch.equal(p, q)


def test_a_factor_that_blocks_share_steps_once_with_its_whole_gradient(one_by_one):
    trained, optimisers = [], []
    for run in (plain, checkpoint_block):
        torch.manual_seed(0)
        shared, own = nn.Linear(32, 32).to(DEVICE), [nn.Linear(32, 32).to(DEVICE) for _ in range(3)]
        parameters = [*shared.parameters(), *(p for linear in own for p in linear.parameters())]
        optimiser = AdamW8bit(parameters, lr=1e-2)
        with optimiser.measuring():
            step(run, shared, own).backward()
        for _ in range(3):
            (step(run, shared, own) + shared.weight.square().sum()).backward()
        trained.append(parameters)
        optimisers.append(optimiser)
    assert all(map(torch.equal, *trained)) and all(each.steps == [3] * 8 for each in optimisers)
    torch.testing.assert_close(*(each._clipping._squares for each in optimisers))


def step(run, shared, own):
    x = torch.ones(SHAPE, device=DEVICE)
    for linear in own:
        x = run(lambda x, linear=linear: shared(linear(x).tanh()), x)
    return x.square().mean()


def test_the_gradient_of_a_parameter_alone_can_be_asked_for():
    block, hidden, kwargs = llama()
    weight = block.mlp.down_proj.weight
    seen, expected = (
        torch.autograd.grad(run(block, hidden, **kwargs).sum(), weight) for run in (checkpoint_block, plain)
    )
    assert torch.equal(*seen, *expected) and weight.grad is None


def test_without_anything_to_train_there_is_no_graph():
    block, hidden, kwargs = llama()
    with torch.no_grad():
        assert not checkpoint_block(block, hidden, **kwargs).requires_grad
    assert not checkpoint_block(block.requires_grad_(False), hidden, **kwargs).requires_grad
    assert not checkpoint_block(block.forward, hidden, **kwargs).requires_grad


def test_a_tuple_stays_a_tuple_and_other_entries_get_gradients_too():
    linear = nn.Linear(32, 32).to(DEVICE)
    hidden = torch.randn(SHAPE, device=DEVICE)

    def block(hidden, shift):
        y = linear(hidden)
        return y + shift, None, y.square(), y.argmax(-1)

    gradients = []
    for run in (plain, checkpoint_block):
        linear.zero_grad()
        leaf = hidden.clone().requires_grad_()
        y, nothing, squares, places = run(block, leaf, 2.0)
        assert nothing is None and not places.requires_grad
        (y.sum() + squares.sum()).backward()
        gradients.append([leaf.grad, linear.weight.grad.clone()])
    assert all(map(torch.equal, *gradients))
    first = checkpoint_block(block, leaf, 2.0)[0]
    first.sum().backward()  # the squares have no consumer


def check_autocast():
    block, hidden, kwargs = llama()
    hidden = hidden.requires_grad_()
    gradients = []
    for run, inside in ((plain, False), (checkpoint_block, False), (checkpoint_block, True)):
        block.zero_grad()
        hidden.grad = None
        with torch.autocast(DEVICE, torch.bfloat16):
            y = run(block, hidden, **kwargs)
            if inside:
                y.float().sum().backward()
        if not inside:
            y.float().sum().backward()
        trained = [p for p in block.parameters() if p.requires_grad]
        gradients.append([hidden.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in trained)])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_autocast_is_the_same_again_also_inside_it():
    check_autocast()


@pytest.mark.parametrize("broken", [{"enabled": False}, {"dtype": torch.float16}])
def test_the_check_sees_another_autocast(monkeypatch, broken):
    present = SUBJECT._autocast
    monkeypatch.setattr(SUBJECT, "_autocast", lambda device: present(device) | broken)
    with pytest.raises((AssertionError, RuntimeError), match=r"equal|same dtype"):
        check_autocast()


# --- bad input


def test_bad_input_is_refused_by_name():
    block, hidden, _ = llama()
    leaf = hidden.clone().requires_grad_()
    for call, message in (
        (lambda: checkpoint_block(block, hidden, keep="int4"), "keep is 'int4'"),
        (lambda: checkpoint_block(block, torch.ones(2, 3, dtype=torch.int64)), "hidden is torch.int64"),
        (lambda: checkpoint_block(block, hidden, leaf), "argument 1 wants a gradient"),
        (
            lambda: checkpoint_block(block, hidden, position_embeddings=(leaf, leaf)),
            "argument position_embeddings wants",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
