"""The operators inside models: what a model computes with them is what it computes without."""

import itertools
import json

import pytest
import torch
from edge_kernels import apply
from family_cases import CASES
from peft import PeftModel
from torch import nn

from edge_runtime import settings
from edge_runtime.adapters import attach, learned
from edge_runtime.demo import commands
from edge_runtime.methods import fedit
from edge_runtime.models import structure, weights
from edge_runtime.trainer import step
from edge_runtime.trainer.examples import epochs
from edge_runtime.trainer.objectives import pad
from edge_runtime.trainer.tokens import Tokenization

FEDIT = fedit.METHOD
SPEC = settings.Adapter(rank=4)


def outcome(model):
    """Logits, and the gradients of every factor of an adapter that is past its start."""
    adapter = attach.attach(model, (0, 1, 2, 3), SPEC, FEDIT, seed=0)
    with torch.no_grad():
        for number, factor in enumerate(adapter.factors.values()):
            factor.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model(ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    return logits.detach(), {key: factor.grad for key, factor in adapter.factors.items()}


def difference(one, two):
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("mlp_tokens", [None, 5])
@pytest.mark.parametrize("family", CASES)
def test_a_model_computes_the_same_with_the_operators(tiny, family, mlp_tokens):
    with_them = tiny(family)
    apply(with_them, structure.modules(with_them), mlp_tokens)
    swapped = sum("forward" in module.__dict__ for module in with_them.modules())
    assert swapped == CASES[family].norms + CASES[family].gates + 4  # and an attention each block
    seen, truth = outcome(with_them), outcome(tiny(family))
    assert difference(seen[0], truth[0]) < 1e-5
    assert max(difference(seen[1][key], truth[1][key]) for key in truth[1]) < 1e-4


def test_the_comparison_sees_an_operator_that_is_wrong(tiny):
    model = tiny("llama")
    apply(model, structure.modules(model)._replace(offset=0.01))
    assert difference(outcome(model)[0], outcome(tiny("llama"))[0]) > 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_taking_them_out_leaves_the_model_as_it_was(tiny, family):
    model = tiny(family)
    undo = apply(model, structure.modules(model))
    undo()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(outcome(model)[0], outcome(tiny(family))[0])


class StrangeNorm(nn.Module):
    def forward(self, x):
        return x


def test_a_module_that_is_not_known_is_refused_by_name_and_nothing_is_swapped(tiny):
    model = tiny("llama")
    model.model.layers[3].input_layernorm = StrangeNorm()
    with pytest.raises(
        ValueError, match=r"model.layers.3.input_layernorm is a StrangeNorm, which is not known"
    ):
        apply(model, structure.modules(model))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_norm_that_is_to_be_trained_is_refused(tiny):
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model.norm wants a gradient"):
        apply(model, structure.modules(model))


# --- a whole training


class PlainLora(nn.Module):
    """The same layer in torch's own operations."""

    def __init__(self, adapted):
        super().__init__()
        self.base, self.scale = adapted.base, adapted.scale
        self.A, self.B = adapted.factors["A"], adapted.factors["B"]

    def forward(self, x):
        z = x @ self.A.to(x.dtype).T
        return torch.nn.functional.linear(x, self.base.weight, self.base.bias) + self.scale * (
            z @ self.B.to(x.dtype).T
        )


REAL_SPEC = settings.Adapter(rank=8, alpha=16)


def losses_of(facts, depth, examples, *, operators, steps, learning_rate=1e-3, form="bfloat16"):
    model = weights.load(facts, depth, form)
    adapter = attach.attach(model, tuple(range(depth)), REAL_SPEC, FEDIT, seed=0)
    if operators:
        apply(model, structure.modules(model))
        training = settings.Training(steps=steps, rows_a_step=4, learning_rate=learning_rate)
        round_settings = step.RoundSettings(training, [tuple(range(depth))])
        learner = step.Learner(model, adapter, examples, round_settings)
        return [learner.step(4) for _ in range(training.steps)]
    for name, module in list(model.named_modules()):
        if isinstance(module, attach.AdapterLinear):
            model.set_submodule(name, PlainLora(module))
    return plain_losses(model, list(adapter.factors.values()), examples, steps, learning_rate)


def plain_losses(model, trained, examples, steps, learning_rate=1e-3):
    """The training loop as one would write it first."""
    training = settings.Training(steps=steps, learning_rate=learning_rate)
    optimiser = torch.optim.AdamW(trained, weight_decay=0.0)
    rows, found = epochs(examples, "0/1"), []
    for number in range(steps):
        ids, labels = pad(list(itertools.islice(rows, 4)), torch.device("cpu"))
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = step.learning_rate(training, number, 1, 1)
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


STEPS = pytest.mark.parametrize(("depth", "steps"), [(2, 20), (30, 60)])


@STEPS
def test_steps_on_the_real_model_follow_the_same_loss(
    demo_facts, demo_tokenizer, record_property, depth, steps
):
    rows = [
        {"text": row["prompt"] + row["completion"]} for row in commands.rows("kitchen", 64, 1, seed=0).train
    ]
    examples = Tokenization(demo_tokenizer, demo_facts.vocabulary, 40).examples(rows)
    plain = losses_of(demo_facts, depth, examples, operators=False, steps=steps)
    seen = losses_of(demo_facts, depth, examples, operators=True, steps=steps)
    assert plain[-1] < plain[0] / 2
    apart = abs(sum(seen) - sum(plain)) / sum(plain)
    record_property("mean loss, relative difference", round(apart, 5))
    assert apart < 0.01
    other = losses_of(demo_facts, depth, examples, operators=True, steps=20, learning_rate=1.5e-3)
    assert abs(sum(other) - sum(plain[:20])) / sum(plain[:20]) > 0.01  # another training is told apart


@STEPS
def test_steps_on_packed_weights_follow_pefts_on_the_same_weights_expanded(
    demo_facts, demo_tokenizer, tmp_path, record_property, depth, steps
):
    rows = [
        {"text": row["prompt"] + row["completion"]} for row in commands.rows("kitchen", 64, 1, seed=0).train
    ]
    examples = Tokenization(demo_tokenizer, demo_facts.vocabulary, 40).examples(rows)
    seen = losses_of(demo_facts, depth, examples, operators=True, steps=steps, form="q4_1")
    model = weights.load(demo_facts, depth, "bfloat16")
    adapter = attach.attach(
        weights.load(demo_facts, depth, "q4_1"), tuple(range(depth)), REAL_SPEC, FEDIT, seed=0
    )
    layers = tuple(range(depth))
    learned.write(
        learned.fold(attach.state(adapter), demo_facts, layers, REAL_SPEC, FEDIT, 0), tmp_path / "adapter"
    )
    # PEFT trains with the scale that ours has; before training B is 0
    config = tmp_path / "adapter" / "adapter_config.json"
    scaled = json.loads(config.read_text()) | {"lora_alpha": REAL_SPEC.alpha}
    config.write_text(json.dumps(scaled))
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    theirs = plain_losses(peft, [p for p in peft.parameters() if p.requires_grad], examples, steps)
    assert theirs[-1] < theirs[0] / 2
    apart = abs(sum(seen) - sum(theirs)) / sum(theirs)
    record_property("mean loss, relative difference", round(apart, 5))
    assert apart < 0.01
