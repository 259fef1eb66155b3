"""A block that runs again in backward against the same block plain: gradients, what is kept, and random numbers."""

import gc
import weakref
from functools import partial

import edge_kernels.checkpoint_block as module
import pytest
import torch
from edge_kernels.adamw8bit import AdamW8bit
from edge_kernels.checkpoint_block import checkpoint_block
from edge_kernels.quant import expand_rows, quantise_rows
from numerics import DEVICE, assert_as_good_as, relative_error
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

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
    return [y.detach(), leaf.grad, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained)]


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


def test_dropout_is_the_same_again():
    block, hidden, kwargs = llama(dropout=0.4)
    other = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.3)).to(DEVICE)
    check(checkpoint_block, [block], hidden, kwargs)
    check(checkpoint_block, [other, other], hidden, {})


def test_the_check_sees_dropout_that_is_drawn_again(monkeypatch):
    block, hidden, kwargs = llama(dropout=0.4)
    monkeypatch.setattr(module, "_set_random_states", lambda *_: None)
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
    assert checkpoint_block(block, hidden, **kwargs).grad_fn.random is not None
    assert checkpoint_block(block.eval(), hidden, **kwargs).grad_fn.random is None


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
        self.block = block

    def __call__(self, hidden, attention_mask, **kwargs):
        return self.block(hidden, attention_mask=None if torch.is_grad_enabled() else attention_mask, **kwargs)


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


def kept_bytes(run):
    """Bytes of the storages that one forward pass saves for backward, parameters aside."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    del y
    return sum(storage.nbytes() for storage in storages.values())


def test_it_keeps_its_input_or_a_byte_a_value():
    block, hidden, kwargs = llama()
    values, rows = hidden.numel(), hidden.numel() // hidden.shape[-1]
    assert kept_bytes(lambda: checkpoint_block(block, hidden, **kwargs)) == 4 * values
    assert kept_bytes(lambda: checkpoint_block(block, hidden, keep="int8", **kwargs)) == values + 4 * rows
    assert kept_bytes(lambda: plain(block, hidden, **kwargs)) > 40 * values


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


def test_a_step_inside_backward_is_that_of_plain_blocks():
    trained = []
    for run in (plain, checkpoint_block):
        first, hidden, kwargs = llama()
        second = llama()[0]
        parameters = [p for block in (first, second) for p in block.parameters() if p.requires_grad]
        AdamW8bit(parameters, lr=1e-2, clip_norm=1.0)
        for _ in range(3):
            run(second, run(first, hidden, **kwargs), **kwargs).square().mean().backward()
            assert all(p.grad is None for p in parameters)
        trained.append(parameters)
    for p, q in zip(*trained, strict=True):
        assert torch.equal(p, q)


def test_without_anything_to_train_there_is_no_graph():
    block, hidden, kwargs = llama()
    with torch.no_grad():
        assert not checkpoint_block(block, hidden, **kwargs).requires_grad
    assert not checkpoint_block(block.requires_grad_(False), hidden, **kwargs).requires_grad


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
    present = module._autocast
    monkeypatch.setattr(module, "_autocast", lambda device: present(device) | broken)
    with pytest.raises(AssertionError):
        check_autocast()


# --- bad input


def test_bad_input_is_refused_by_name():
    block, hidden, _ = llama()
    trained = hidden.clone().requires_grad_()
    for call, message in (
        (lambda: checkpoint_block(block, hidden, keep="int4"), "keep is 'int4'"),
        (lambda: checkpoint_block(block, torch.ones(2, 3, dtype=torch.int64)), "hidden is torch.int64"),
        (lambda: checkpoint_block(plain, hidden, trained), r"args\[0\] wants a gradient"),
        (lambda: checkpoint_block(block, hidden, position_embeddings=(hidden, trained)), "position_embeddings wants"),
        (lambda: checkpoint_block(lambda h: {"hidden": h}, trained), "block gives dict"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
