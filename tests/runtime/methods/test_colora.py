"""Co-LoRA: a gate of the row lets in what the others have learned, and a device's own part is never in that."""

import numpy as np
import pytest
import torch
from edge_kernels import apply
from test_adapters import LAYERS, difference, random_state
from test_training import draw_examples

from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.errors import InputError
from edge_runtime.methods import colora
from edge_runtime.methods.interface import Contribution
from edge_runtime.models import structure
from edge_runtime.trainer.examples import IGNORED, Example
from edge_runtime.trainer.objectives import hidden_states
from edge_runtime.trainer.step import recomputed_blocks

SPEC = settings.Adapter(rank=4, alpha=12.0)
METHOD = colora.CoLora(rank=3, stages=2).method()
KEY = "peers.0.q."


def maps(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, 4)).astype(np.float32)


def merged(sent, before=()):
    """The version after a round in which devices sent these R."""
    before = dict(before)
    given = [Contribution(before, {KEY + "R": R.copy()}, rows) for rows, R in enumerate(sent, 10)]
    steps = colora.mean_of_devices(lambda: given)
    return {key: before.get(key, 0) + step for key, step in steps.items()}


def received(version, R=None, method=METHOD):
    """O as a device has it that sent R to the version; None: it sent nothing."""
    version = {key: value.copy() for key, value in version.items()}
    method.received(version, {} if R is None else {KEY + "R": R})
    return version[KEY + "O"]


# --- who is in the mean


def test_each_device_gets_the_mean_of_the_others():
    R = maps(4)
    version = merged(R, {KEY + "O": maps(1)[0], KEY + "N": np.ones(1, np.float32)})
    assert version[KEY + "N"] == 4
    np.testing.assert_allclose(version[KEY + "O"], R.mean(0), atol=1e-6)  # whatever their rows
    for number in range(4):
        others = np.delete(R, number, 0).mean(0)
        np.testing.assert_allclose(received(version, R[number]), others, atol=1e-5)
        # a device that was not in the round hears all four; with the check above, an own part would show
        assert np.abs(received(version) - others).max() > 0.1


def test_a_devices_own_part_moves_nothing_that_it_gets():
    R = maps(3)
    louder = np.stack([1000 * R[0], *R[1:]])
    before, after = (received(merged(each), each[0]) for each in (R, louder))
    np.testing.assert_allclose(before, after, atol=1e-3)
    assert (
        np.abs(received(merged(louder), R[1]) - received(merged(R), R[1])).max() > 100
    )  # the others hear it


def test_a_device_alone_gets_nothing():
    R = maps(1)
    assert not received(merged(R), R[0]).any()
    assert received(merged(R)).any()


def test_drawn_values_have_the_size_of_the_others_and_nothing_else_of_them():
    drawn = colora.CoLora(rank=3, others="drawn").method()
    R = maps(3)
    true, random = received(merged(R), R[0]), received(merged(R), R[0], drawn)
    assert np.linalg.norm(random) == pytest.approx(np.linalg.norm(true), rel=0.5)
    assert np.abs(random - true).max() > 0.1
    assert np.array_equal(random, received(merged(R), R[0], drawn))  # it is the same in each round


# --- the layer


def attached(model, method=METHOD):
    """The model with random maps of the frame, and everything else at its start; the adapter."""
    adapter = attach.attach(model, LAYERS, SPEC, method, seed=0)
    values = attach.state(adapter)
    values |= {key: value for key, value in random_state(adapter).items() if key[-1] in "FG"}
    attach.load_state(adapter, values)
    return adapter


def opened(model, method=METHOD):
    adapter = attached(model, method)
    attach.load_state(adapter, random_state(adapter))
    return adapter


@torch.no_grad()
def states(model, rows):
    return hidden_states(model, rows)[0]


ROWS = draw_examples(6)


@pytest.mark.parametrize("gate", ["trained", "closed"])
def test_version_0_is_the_base_model_and_layers_of_a_stage_share_their_maps(tiny, gate):
    plain = states(tiny("llama"), ROWS)
    model = tiny("llama")
    adapter = attached(model, colora.CoLora(rank=3, stages=2, gate=gate).method())
    assert difference(plain, states(model, ROWS)) < 1e-6
    assert [key for key in adapter.factors if key.endswith("q.R")] == ["peers.0.q.R", "peers.1.q.R"]
    values = random_state(adapter)
    attach.load_state(adapter, values)
    moved = states(model, ROWS)
    assert difference(plain, moved) > 1e-2
    # without the others' part it is another model, unless the gate is closed
    attach.load_state(adapter, {key: value * (key[-1] != "O") for key, value in values.items()})
    assert bool(difference(moved, states(model, ROWS)) > 1e-3) is (gate == "trained")


def test_only_the_own_map_and_the_gate_train(tiny):
    model = tiny("llama")
    adapter = opened(model)
    hidden_states(model, ROWS)[0].sum().backward()
    assert {key[-1] for key, factor in adapter.factors.items() if factor.grad is not None} == set("ABRw")


def test_the_layer_is_its_equation(tiny):
    model = tiny("llama")
    opened(model)
    linear = next(module for module in model.modules() if isinstance(module, attach.AdapterLinear))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    attach.tell_prompts(model, [3, 5], 5)
    f = {name: factor.detach().double() for name, factor in linear.factors.items()}
    expected = []
    for row, prompt in zip(x.double(), (3, 5), strict=True):
        g = torch.sigmoid((row[:prompt] @ f["w"]).mean())
        u = torch.cat([row @ f["F"].T, torch.ones(5, 1)], 1)
        branch = g * u @ f["O"].T + (1 - g) * u @ f["R"].T
        lora = row @ f["A"].T @ f["B"].T
        expected.append(row @ linear.base.weight.double().T + linear.scale * (lora + branch @ f["G"].T))
    with torch.no_grad():
        assert difference(linear(x).double(), torch.stack(expected)) < 1e-5


# --- what the gate reads


def shown(model, row, others=()):
    """The row's states, alone or in a batch that pads it."""
    return states(model, [row, *others])[0, : len(row.ids)]


LONG = Example(list(range(3, 40)), [], 0)


def test_the_gate_is_of_the_row_and_not_of_its_padding_or_its_neighbours(tiny):
    model = tiny("llama")
    opened(model)
    row = Example(list(range(5, 15)), [], 0)
    alone = shown(model, row)
    assert difference(shown(model, row, [LONG]), alone) < 1e-4
    ids = torch.tensor([row.ids + [0] * 30])
    attach.tell_prompts(model, [40], 40)  # as if the padding were read
    with torch.no_grad():
        padded = model.base_model(input_ids=ids).last_hidden_state[0, : len(row.ids)]
    assert difference(padded, alone) > 1e-3


def test_the_gate_reads_the_prompt_alone_so_that_an_answer_is_no_hint(tiny):
    model = tiny("llama")
    opened(model)
    ids = list(range(5, 15))
    learned = [IGNORED] * 6 + ids[6:]
    before = shown(model, Example(ids, learned))[:6]
    answer, prompt = [*ids[:6], 50, 51, 52, 53], [60, *ids[1:]]
    assert difference(shown(model, Example(answer, [IGNORED] * 6 + answer[6:]))[:6], before) < 1e-6
    assert (
        difference(shown(model, Example(answer, [], 0))[:6], before) > 1e-5
    )  # a gate that reads all does see it
    # the last token of a prompt opens the gate of the first
    last = [*ids[:5], 60, *ids[6:]]
    assert difference(shown(model, Example(last, [IGNORED] * 6 + last[6:]))[:5], before[:5]) > 1e-5
    assert difference(shown(model, Example(prompt, learned))[:6], before) > 1e-3


def test_a_prompt_ends_before_the_first_learned_token():
    assert Example([5, 6, 7], [IGNORED, IGNORED, 7]).prompt == 2
    assert Example([5, 6, 7], [5, 6, 7]).prompt == 1  # the first is never predicted
    assert Example([5, 6, 7], [], 0).prompt == 3


def test_a_block_that_runs_again_has_the_gates_it_had(tiny):
    model = tiny("llama")
    factors = opened(model).factors

    def gradients(kept_blocks, shorter=False):
        model.zero_grad()
        with recomputed_blocks(model, kept_blocks=kept_blocks):
            hidden = hidden_states(model, ROWS)[0]
            if shorter:  # other prompts are told before the blocks run again
                attach.tell_prompts(model, [1] * len(ROWS), hidden.shape[1])
            hidden.square().mean().backward()
        return {key: factor.grad.clone() for key, factor in factors.items() if factor.grad is not None}

    plain, again, wrong = gradients(4), gradients(0), gradients(0, shorter=True)
    assert plain.keys() == again.keys() == wrong.keys()
    assert max(difference(again[key], plain[key]) for key in plain) < 1e-4
    assert max(difference(wrong[key], plain[key]) for key in plain) > 1e-2


# --- what a gate cannot do


@pytest.mark.parametrize("gate", ["trained", "closed"])
def test_single_tokens_and_tiles_have_no_gate_and_are_refused_by_name(tiny, gate):
    model = tiny("llama")
    opened(model, colora.CoLora(rank=3, gate=gate).method())
    ids = torch.tensor([[5, 6, 7, 8]])

    def refused():
        try:
            with torch.no_grad():
                model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        except InputError as error:
            return "a layer of colora has inputs of" in str(error)
        return False

    assert refused() is (gate == "trained")  # no prompts were told
    attach.tell_prompts(model, [4], 4)
    assert refused() is (gate == "trained")  # they were, and the next token comes alone
    apply(model, structure.modules(model), 5)
    rows = [Example(list(range(3, 11)), [], 0)]
    if gate == "trained":
        with pytest.raises(InputError, match="nor MLPs run in tiles"):
            states(model, rows)
    else:
        assert states(model, rows).isfinite().all()


TABLES = {
    "fleet": {"name": "f"},
    "catalog": [{"source": "m"}],
    "public": {"file": "public.jsonl", "texts": 5},
    "codistill": {},
}


def test_completions_are_refused_before_anything_is_trained():
    def of(**tables):
        return methods.of(settings.parse({**TABLES, **tables}))

    with pytest.raises(InputError, match="the gate of colora reads whole rows"):
        of(method={"name": "colora"})
    assert of(method={"name": "colora"}, head={}).gate is not None
    assert of(method={"name": "colora", "gate": "closed"}).gate is None


def test_public_texts_are_needed_and_controls_are_settings():
    without = {key: TABLES[key] for key in ("fleet", "catalog")}
    with pytest.raises(InputError, match=r"add \[public\] with their file"):
        methods.of(settings.parse({**without, "method": {"name": "colora"}}))
    assert METHOD.scope("peers") == "fleet"
    assert colora.CoLora(across=False).method().scope("peers") == "class"
