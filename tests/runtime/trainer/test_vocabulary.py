"""Every family's loss is transformers' own: nothing of a head is left out, from the file to the figure."""

import pytest
import torch
from edge_kernels import apply
from family_cases import CASES

from edge_runtime.models import structure, weights
from edge_runtime.trainer.examples import Example
from edge_runtime.trainer.objectives import Text, hidden_states
from edge_runtime.trainer.vocabulary import Divergence, language_head

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
ROWS = [Example(ids, ids) for ids in IDS.tolist()]
# of the heads that are more than a matrix, the part that a twin leaves out
PARTS = {"phi": {"bias": None}, "gemma2": {"softcap": None}, "gemma3_text": {"softcap": None}}
CHANGES = {"gemma3_text": {"final_logit_softcapping": 3.0}, "gemma2": {"final_logit_softcapping": 3.0}}


@torch.no_grad()
def figures(model, **left_out):
    """The loss that is trained on, and the mean of the loss that is reported."""
    text = Text(language_head(model)._replace(**left_out))
    hidden, labels = hidden_states(model, ROWS)
    total, tokens, _ = text.tally(ROWS, hidden, labels)
    return text.output(ROWS, hidden, labels).loss.item(), total / tokens


def gradient(loss, hidden):
    """Of a loss with respect to the last hidden states."""
    leaf = hidden.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.fixture
def saved(tiny, facts_of, tmp_path):
    def save(family):
        model = tiny(family, **CHANGES.get(family, {}))
        model.save_pretrained(tmp_path)
        return model, facts_of(model, folder=str(tmp_path), weights=str(tmp_path))

    return save


def product(facts, form):
    model = weights.load(facts, facts.layers, form)
    apply(model, structure.modules(model))
    return model


@pytest.mark.parametrize("family", CASES)
def test_the_loss_is_transformers_own(saved, family):
    theirs, facts = saved(family)
    truth = theirs(IDS, labels=IDS).loss.item()
    ours = product(facts, "float32")
    assert figures(ours) == pytest.approx((truth, truth), abs=1e-4)
    if family in PARTS:
        assert abs(figures(ours, **PARTS[family])[0] - truth) > 1e-2


@pytest.mark.parametrize("family", PARTS)
def test_the_losss_gradient_is_that_of_transformers_logits(tiny, family):
    model = tiny(family, **CHANGES.get(family, {}))
    hidden, labels = hidden_states(model, ROWS)
    head = language_head(model)

    def theirs(state):
        logits = model.lm_head(state)[:, :-1]
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    def ours(head):
        return gradient(lambda state: Text(head).output(ROWS, state, labels).loss, hidden)

    truth = gradient(theirs, hidden)
    assert float((ours(head) - truth).norm() / truth.norm()) < 1e-4
    other = ours(head._replace(**PARTS[family]))
    assert float((other - truth).norm() / truth.norm()) > 1e-2


def test_every_head_that_is_more_than_a_matrix_has_its_twin(tiny):
    heads = {family: language_head(tiny(family, **CHANGES.get(family, {}))) for family in CASES}
    assert {family for family, head in heads.items() if any(part is not None for part in head[1:])} == set(
        PARTS
    )


def test_a_packed_head_keeps_its_bias_dense(saved):
    theirs, facts = saved("phi")
    truth = theirs(IDS, labels=IDS).loss.item()
    ours = product(facts, "q8_0")
    head = language_head(ours)
    assert head.weight.format == "q8_0" and head.bias.dtype == torch.bfloat16
    assert figures(ours) == pytest.approx((truth, truth), rel=0.02)
    assert abs(figures(ours, bias=None)[0] - truth) > 0.02 * truth


@torch.no_grad()
def test_a_divergence_is_that_of_whole_predictions(tiny):
    model = tiny("phi")
    before, after = hidden_states(model, ROWS)[0]
    old, new = (model.lm_head(state).double().log_softmax(-1) for state in (before, after))
    truth = torch.nn.functional.kl_div(new, old, log_target=True, reduction="batchmean").item()
    head = language_head(model)
    assert Divergence.apply(before, after, head, 1 << 20).item() == pytest.approx(truth, rel=1e-4)
    other = Divergence.apply(before, after, head._replace(bias=None), 1 << 20).item()
    assert other != pytest.approx(truth, rel=1e-2)
