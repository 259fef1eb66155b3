"""Attention against float64, what it keeps, where torch's own stays, and what is refused."""

import importlib

import pytest
import torch
from edge_kernels import Modules, apply
from edge_kernels.attention import SHORT, attention
from numerics import DEVICE, ON_GPU, assert_as_good_as
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SCALE = 0.3
module = importlib.import_module("edge_kernels.attention")  # the package's name for it is the function
ROWS_BACKWARD = module._rows_backward
on_cpu = pytest.mark.skipif(ON_GPU, reason="on a GPU attention is torch's")


def plain(q, k, v, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = scale * q @ k.mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def case(dtype=torch.bfloat16, batch=2, heads=3, key_heads=1, tokens=5, width=8):
    """q, k and v laid out as a layer's projections leave them: (batch, tokens, heads, width), seen with heads first."""
    torch.manual_seed(0)
    drawn = (torch.randn(batch, tokens, count, width) for count in (heads, key_heads, key_heads))
    return [x.to(DEVICE, dtype).transpose(1, 2) for x in drawn]


def outcome(fn, q, k, v):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = fn(*leaves, SCALE)
    torch.manual_seed(1)
    o.backward(torch.randn(o.shape, dtype=torch.float64).to(DEVICE, o.dtype))
    return [o.detach(), *(leaf.grad for leaf in leaves)]


def check(fn, draws):
    truth = outcome(plain, *(draw.double() for draw in draws))
    assert_as_good_as(outcome(fn, *draws), outcome(plain, *draws), truth)


SHAPES = [
    {},
    {"tokens": 1},
    {"tokens": 65, "heads": 9, "key_heads": 3, "width": 64},  # a tile and one query
    {"tokens": 200, "batch": 3, "heads": 4, "key_heads": 4},
    {"tokens": SHORT, "batch": 3, "heads": 8, "width": 16},  # a row of the batch at a time
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_good_as_torchs(dtype, shape):
    check(attention, case(dtype, **shape))


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 5), (torch.bfloat16, SHORT + 1)])
def test_other_types_and_long_rows_are_torchs_own(dtype, tokens):
    draws = case(dtype, tokens=tokens, heads=1)
    own = outcome(
        lambda q, k, v, scale: scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), *draws
    )
    assert all(map(torch.equal, outcome(attention, *draws), own))


def test_gradients_are_laid_out_like_what_they_belong_to():
    draws = case(tokens=70)
    for draw, gradient in zip(draws, outcome(attention, *draws)[1:], strict=True):
        assert gradient.stride() == draw.stride()


MUTANTS = {
    "no gradient for the keys": lambda q, k, v, scale: attention(q, k.detach(), v, scale) + 0 * k.sum(),
    "another scale": lambda q, k, v, scale: attention(q, k, v, 1.1 * scale),
    "keys and values change places": lambda q, k, v, scale: attention(q, v, k, scale),
    "later keys are seen": lambda q, k, v, scale: attention(q, k.flip(2), v.flip(2), scale),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_check_sees_a_fault(fault):
    with pytest.raises(AssertionError, match="relative error"):
        check(MUTANTS[fault], case())


@on_cpu
def test_the_check_sees_a_tile_that_sees_its_own_later_keys(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda self, *_: self)
    with pytest.raises(AssertionError, match="relative error"):
        check(attention, case(tokens=80))


@pytest.mark.parametrize("tokens", [70, SHORT + 1])
def test_the_result_is_the_same_where_no_gradient_is_wanted(tokens):
    draws = case(tokens=tokens)
    result = outcome(attention, *draws)[0]
    with torch.no_grad():
        assert torch.equal(attention(*draws, SCALE), result)


@on_cpu
def test_q_k_v_and_the_result_alone_are_kept():
    kept = []
    q, k, v = (x.requires_grad_() for x in case())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        o = attention(q, k, v, SCALE)
    assert kept == [x.data_ptr() for x in (q, k, v, o)]


MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
    "gemma3, the window open": lambda: gemma3(window=64),
    "gemma3, beyond its window": lambda: gemma3(window=4),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
        )
    ),
}
MODULES = {
    "llama": Modules("LlamaRMSNorm", 0.0, "LlamaMLP", "gated"),
    "gemma3": Modules("Gemma3RMSNorm", 1.0, "Gemma3MLP", "gated"),
    "gpt2": Modules("", 0.0, "GPT2MLP", "plain"),
}
OURS_RUNS = {"llama": 2, "gemma3, the window open": 2, "gemma3, beyond its window": 1, "gpt2": 2}


def gemma3(window):
    config = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config)


@on_cpu
@pytest.mark.parametrize("name", MODELS)
def test_in_a_model_it_runs_wherever_later_keys_alone_are_masked_and_gradients_agree(name, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16().requires_grad_(False)
    seen = []
    monkeypatch.setattr(module, "_rows_backward", lambda *rows: seen.append(1) or ROWS_BACKWARD(*rows))
    embedded = model.get_input_embeddings()(torch.arange(20).view(2, 10))

    def gradient():
        x = embedded.detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        return x.grad.float()

    theirs = gradient()
    assert not seen
    undo = apply(model, MODULES[name.partition(",")[0]])
    ours = gradient()
    assert len(seen) == OURS_RUNS[name]
    undo()
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()
    seen.clear()
    gradient()
    assert not seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 5, 8)}, r"q is \(2, 5, 8\)"),
        ({"v": torch.ones(2, 1, 4, 8)}, r"v \(2, 1, 4, 8\): heads do not fit together"),
        (
            {"q": torch.ones(2, 3, 4, 8)},
            r"q is \(2, 3, 4, 8\) but k \(2, 1, 5, 8\): only their heads may differ",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    draws = dict(zip("qkv", case(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        attention(**draws, scale=SCALE)
