"""The torch engine writes what transformers writes with the merged model, whatever the family, slice or cache."""

import msgspec
import numpy as np
import pytest
import torch
from edge_kernels import Packed
from family_cases import CASES

from edge_runtime.errors import InputError
from edge_runtime.models import structure, weights
from edge_runtime.serving.engine import depth_of
from edge_runtime.serving.torch_engine import TorchEngine

PROMPT = [1, 17, 60, 4, 33, 8, 71]


def greedy(engine, tokens, prompt=PROMPT):
    """The likeliest tokens after a prompt."""
    sequence, written = engine.begin(), []
    logits = sequence.feed(prompt)
    for _ in range(tokens):
        written.append(int(logits.argmax()))
        logits = sequence.feed(written[-1:])
    return written


def merged(facts, learned):
    """The slice with the adapter in its weights, by torch and transformers alone."""
    model = weights.load(facts, len(learned.layers), "float32")
    row = structure.family(model)
    for layer, block in zip(learned.layers, structure.blocks(model), strict=True):
        for role, linear in structure.linears(block, row).items():
            A, B = map(torch.from_numpy, learned.factors[layer, role])
            linear.weight += (B @ A).T if row.transposed else B @ A
    return model


def by_transformers(model, tokens, prompt=PROMPT):
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("family", "depth"), [("llama", 4), *((family, 3) for family in CASES)])
def test_greedy_is_what_transformers_writes_with_the_merged_model(checkpoint, learn, family, depth):
    facts = checkpoint(family, tie_word_embeddings=False)  # a tied model repeats the last token
    learned = learn(facts, depth)
    truth = by_transformers(merged(facts, learned), 8)
    assert greedy(TorchEngine(facts, learned, "float32"), 8) == truth
    # the twin: factors of another version, and none
    assert greedy(TorchEngine(facts, learn(facts, depth, 2), "float32"), 8) != truth
    assert len(set(truth)) > 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_prompt_in_pieces_is_the_prompt_at_once(checkpoint, family):
    """A window of 4 tokens is shorter than each piece and than the answer."""
    windows = {} if family == "llama" else {"sliding_window": 4}
    engine = TorchEngine(checkpoint(family, **windows), None, "float32")
    prompt = list(range(3, 33))
    pieces = engine.begin()
    for first in range(0, len(prompt), 7):
        logits = pieces.feed(prompt[first : first + 7])
    assert np.abs(logits - engine.begin().feed(prompt)).max() < 1e-4
    assert np.abs(logits - engine.begin().feed(prompt[-7:])).max() > 1e-2


def test_a_packed_base_stays_packed(checkpoint, learn):
    facts = checkpoint("llama")
    learned = learn(facts)
    engine = TorchEngine(facts, learned, "q8_0")
    served = list(
        structure.linears(structure.blocks(engine.model)[0], structure.family(engine.model)).values()
    )
    assert all(isinstance(layer.base.weight, Packed) for layer in served)
    exact, packed = (TorchEngine(facts, learned, name).begin().feed(PROMPT) for name in ("float32", "q8_0"))
    assert 0 < np.abs(exact - packed).max() < 0.1 * np.abs(exact).max()


def test_a_sequence_keeps_the_adapter_that_it_began_with(checkpoint, learn):
    facts = checkpoint("llama")
    first, second = learn(facts), learn(facts, version=2)
    truths = [TorchEngine(facts, learned, "float32") for learned in (first, second)]
    engine = TorchEngine(facts, first, "float32")
    running = engine.begin()
    running.feed(PROMPT)
    engine.swap(second)
    later = engine.begin()
    later.feed(PROMPT)
    assert (running.version, later.version, engine.version) == (1, 2, 2)
    for sequence, truth in zip((running, later), truths, strict=True):
        other = truth.begin()
        other.feed(PROMPT)
        assert np.array_equal(sequence.feed([5]), other.feed([5]))


def test_an_adapter_of_another_base_is_refused_and_the_one_before_stays(checkpoint, learn):
    facts = checkpoint("llama")
    engine = TorchEngine(facts, learn(facts, 3), "float32")
    with pytest.raises(
        InputError, match="version 2 was learned on 2 layers, but the base that is loaded has 3"
    ):
        engine.swap(learn(facts, 2, version=2))
    other = msgspec.structs.replace(facts, model_class="tiny@other")
    with pytest.raises(InputError, match="the adapter was trained on tiny@other"):
        engine.swap(learn(other, 3))
    assert engine.version == 1


def test_layers_that_are_no_slice_are_refused(checkpoint, learn):
    facts = checkpoint("llama")
    with pytest.raises(InputError, match=r"the layers \(0, 1\), which are no slice"):
        depth_of(facts, learn(facts, 2)._replace(layers=(0, 1)))
    assert depth_of(facts, None) == 4 and depth_of(facts, learn(facts, 2)) == 2
