"""Training and evaluation on tiny random models against torch's own, and the trainer as the process it is on a device."""

import errno
import math
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from edge_kernels import AdamW8bit
from jobs import chain_of, job_of
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator import check
from edge_runtime.errors import InputError, TrainerError
from edge_runtime.methods import fedit
from edge_runtime.models import structure, weights
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning import processes
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import parse
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.trainer import data, disk, objectives, run, step
from edge_runtime.trainer.examples import IGNORED, Example
from edge_runtime.trainer.job import Job, Progress
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.objectives import evaluate, pad
from edge_runtime.trainer.step import only_blocks, recomputed_blocks
from edge_runtime.trainer.tokens import Tokenization

FEDIT = fedit.METHOD
SPEC = settings.Adapter(rank=4, alpha=8.0)
LAYERS = (0, 1, 2, 3)


def draw_examples(count, seed=0):
    """Rows of 4 to 12 tokens, of which the last 1 to 5 are learned."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = draw.integers(3, 96, draw.integers(6, 13)).tolist()
        prompt = len(ids) - int(draw.integers(1, 6))
        found.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    return found


def adapted(model, spec=SPEC):
    """The model with an adapter that is past its start, so that A has a gradient too."""
    adapter = attach.attach(model, LAYERS, spec, FEDIT, seed=0)
    draw = np.random.default_rng(1)
    start = {
        key: draw.normal(0, 0.05, value.shape).astype(np.float32)
        for key, value in attach.state(adapter).items()
    }
    attach.load_state(adapter, start)
    return adapter


def plan_of(**how):
    names = {
        "source": "m",
        "model_class": "m@1",
        "depth": 4,
        "layers": 4,
        "weights": "float32",
        "rank": SPEC.rank,
    }
    return Plan(**{**names, "tokens": 32, "terms": {}, "step_seconds": 1.0, **how})


def train(
    model,
    adapter,
    examples,
    micro_rows=4,
    slices=None,
    progress=lambda *_: None,
    ease=lambda: None,
    kept_blocks=0,
    **training,
):
    wanted = settings.Training(**{"steps": 1, "rows_a_step": 8, "learning_rate": 1e-2, **training})
    everything = [tuple(range(len(structure.blocks(model))))]
    learner = step.Learner(model, adapter, examples, step.RoundSettings(wanted, slices or everything))
    plan = plan_of(rows=micro_rows, kept_blocks=kept_blocks)
    for number in range(1, wanted.steps + 1):
        progress(number, learner.step(plan.rows, plan.boundaries, plan.kept_blocks))
        plan = ease() or plan
    learner.close()
    return learner.losses


def relative_difference(one, two):
    return max(float((one[key] - two[key]).norm() / two[key].norm()) for key in two)


# --- one round


def test_the_loss_falls(tiny):
    model = tiny("llama")
    adapter, examples, told = adapted(model), draw_examples(8), []
    losses = train(model, adapter, examples, steps=25, progress=lambda done, loss: told.append((done, loss)))
    assert told == list(enumerate(losses, 1))
    assert losses[-1] < losses[0] / 2
    frozen = tiny("llama").state_dict()
    assert all(
        torch.equal(value, frozen[name.replace(".base", "")])
        for name, value in model.state_dict().items()
        if not name.endswith((".A", ".B"))
    )


def test_equal_seeds_train_equally(tiny):
    made = []
    for _ in range(2):
        model = tiny("llama")
        adapter = adapted(model)
        made.append((train(model, adapter, draw_examples(20), steps=3), attach.state(adapter)))
    assert made[0][0] == made[1][0]
    assert all(np.array_equal(made[0][1][key], made[1][1][key]) for key in made[0][1])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_step_through_a_slice_is_the_step_of_that_slice_alone(tiny, family):
    examples, kept = draw_examples(8), (0, 3)
    deep = tiny(family)
    adapter = adapted(deep)
    before = attach.state(adapter)
    losses = train(deep, adapter, examples, steps=2, slices=[kept, (0, 1, 2, 3)])
    shallow = tiny(family)
    with only_blocks(shallow, kept):
        alone = attach.attach(shallow, kept, SPEC, FEDIT, seed=0)
        attach.load_state(alone, {key: before[key] for key in alone.factors})
        assert train(shallow, alone, examples, steps=1, slices=[(0, 1)]) == pytest.approx(
            losses[:1], abs=1e-6
        )
    assert len(structure.blocks(deep)) == len(structure.blocks(shallow)) == deep.config.num_hidden_layers == 4


def test_only_the_blocks_of_its_slices_are_trained(tiny):
    model = tiny("llama")
    adapter = adapted(model)
    before = attach.state(adapter)
    train(model, adapter, draw_examples(8), steps=2, slices=[(0, 3), (0, 1, 3)])
    moved = {
        key.split(".")[1]
        for key, value in attach.state(adapter).items()
        if not np.array_equal(value, before[key])
    }
    assert moved == {"0", "1", "3"}


def gradient(model, examples, micro_rows):
    """The gradient that one optimiser step is made from, before it is clipped."""
    adapter, found = adapted(model), {}
    keys, shapes = list(adapter.factors), [factor.shape for factor in adapter.factors.values()]

    def seen(self, index, grad):
        found[keys[index]] = grad.view(shapes[index]).clone()

    with mock.patch.object(AdamW8bit, "_update", seen):
        train(model, adapter, examples, micro_rows, rows_a_step=len(examples))
    return found


def torchs_gradient(model, examples, mean):
    """The gradient of torch's cross-entropy over all labelled tokens, or of the mean of the rows' own means."""
    adapter = adapted(model)
    ids, labels = pad(examples, torch.device("cpu"))
    logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    kept = (labels[:, 1:] != IGNORED).float()
    losses = losses.view(kept.shape)
    loss = losses.sum() / kept.sum() if mean == "tokens" else (losses.sum(1) / kept.sum(1)).mean()
    loss.backward()
    return {key: factor.grad for key, factor in adapter.factors.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("micro_rows", [1, 3, 8])
def test_micro_batches_of_any_size_make_the_gradient_of_the_whole_step(tiny, family, micro_rows):
    examples = draw_examples(8)
    truth = torchs_gradient(tiny(family), examples, "tokens")
    seen = gradient(tiny(family), examples, micro_rows)
    assert relative_difference(seen, truth) < 1e-4
    assert (
        relative_difference(seen, torchs_gradient(tiny(family), examples, "rows")) > 1e-2
    )  # what it would be if wrong


def test_recomputed_blocks_keep_only_their_inputs_and_give_the_same_gradient(tiny):
    gradients, runs = [], []
    for recompute in (False, True):
        model = tiny("llama")
        adapter = adapted(model)
        count = []
        for block in structure.blocks(model):
            block.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        ids, labels = pad(draw_examples(4), torch.device("cpu"))
        if recompute:
            with recomputed_blocks(model):
                assert model.training
                model(ids, labels=labels, use_cache=False).loss.backward()
            assert not model.training
        else:
            model(ids, labels=labels, use_cache=False).loss.backward()
        gradients.append({key: factor.grad for key, factor in adapter.factors.items()})
        runs.append(len(count))
    assert runs == [4, 8]
    assert relative_difference(gradients[1], gradients[0]) < 1e-6


def test_dropout_is_drawn_alike_when_a_block_runs_again(tiny):
    """Else its gradient would be of another function; seen as a difference from a plain backward with equal draws."""
    gradients = []
    for recompute in (False, True):
        model = tiny("gpt2", resid_pdrop=0.3)
        adapter = adapted(model)
        ids, labels = pad(draw_examples(4), torch.device("cpu"))
        model.train()
        torch.manual_seed(5)
        if recompute:
            with recomputed_blocks(model):
                model(ids, labels=labels, use_cache=False).loss.backward()
        else:
            model(ids, labels=labels, use_cache=False).loss.backward()
        gradients.append({key: factor.grad for key, factor in adapter.factors.items()})
    assert relative_difference(gradients[1], gradients[0]) < 1e-6


def test_eased_steps_make_the_same_round(tiny):
    """Blocks that run once give the same steps but for the order in which factors of a block come to the clipping; smaller
    micro-batches too; 8-bit boundaries nearly."""
    plans = {micro_rows: plan_of(rows=micro_rows) for micro_rows in (4, 2)}
    plans["int8"] = plan_of(rows=2, boundaries="int8")
    seen = {}
    for name, answers in {
        "as before": [],
        "kept": [],
        "smaller": [4, 2],
        "int8": ["int8"],
        "other": [],
    }.items():
        model, asked = tiny("llama"), iter(answers)
        adapter = adapted(model)
        rate = {"learning_rate": 2e-2} if name == "other" else {"kept_blocks": 1} if name == "kept" else {}
        losses = train(
            model,
            adapter,
            draw_examples(8),
            micro_rows=8,
            steps=4,
            ease=lambda asked=asked: plans.get(next(asked, None)),
            **rate,
        )
        seen[name] = losses
    assert seen["kept"] == pytest.approx(seen["as before"], rel=1e-3)
    assert seen["smaller"] == pytest.approx(seen["as before"], rel=1e-5)
    assert seen["int8"] == pytest.approx(seen["as before"], rel=1e-2)
    assert seen["int8"] != pytest.approx(seen["as before"], rel=1e-6)
    assert seen["other"][-1] != pytest.approx(seen["as before"][-1], rel=1e-2)


def test_only_the_blocks_that_are_not_kept_run_again(tiny):
    ran = {}
    for kept_blocks in (0, 1):
        model, calls = tiny("llama"), []
        for number, block in enumerate(structure.blocks(model)):
            block.self_attn.register_forward_hook(lambda *_, number=number, calls=calls: calls.append(number))
        train(model, adapted(model), draw_examples(8), micro_rows=8, steps=2, kept_blocks=kept_blocks)
        ran[kept_blocks] = Counter(calls)
    *others, last = sorted(ran[0])
    assert ran[0][last] == 2 * ran[1][last] > 0
    assert others and all(ran[0][number] == ran[1][number] for number in others)


def test_a_step_whose_loss_is_not_finite_is_skipped(tiny, monkeypatch):
    operator, calls = objectives.linear_cross_entropy, []

    def now_and_then(*arguments):
        calls.append(1)
        return operator(*arguments) * (math.nan if len(calls) in (4, 6) else 1.0)

    monkeypatch.setattr(objectives, "linear_cross_entropy", now_and_then)
    model = tiny("llama")
    adapter, told = adapted(model), []
    losses = train(
        model, adapter, draw_examples(8), micro_rows=4, steps=4, progress=lambda *what: told.append(what)
    )
    assert [math.isnan(loss) for loss in losses] == [False, True, True, False]  # a step is two micro-batches
    assert [math.isnan(loss) for _, loss in told] == [False, True, True, False]
    assert all(np.isfinite(value).all() for value in attach.state(adapter).values())


def test_losses_that_stay_infinite_end_the_round(tiny):
    model = tiny("llama")
    adapter = adapted(model)
    before = attach.state(adapter)
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        TrainerError, match="not finite 5 times in a row, up to step 5 of round 1; lower the learning rate"
    ):
        train(model, adapter, draw_examples(8), steps=9)
    assert all(np.array_equal(value, before[key]) for key, value in attach.state(adapter).items())


def test_the_learning_rate_warms_up_each_round_and_falls_to_a_tenth_over_all():
    training = settings.Training(steps=10, learning_rate=1e-2, warmup_steps=4)
    rates = [[step.learning_rate(training, at, round_, 20) for at in range(10)] for round_ in range(1, 21)]
    assert rates[0][0] == pytest.approx(1e-2 / 4)
    assert rates[0][3] == pytest.approx(1e-2, rel=0.01)
    assert rates[10][4] == pytest.approx(1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * 104 / 200))))
    assert rates[19][9] == pytest.approx(1e-3, rel=0.01)
    flat = [rate for one in rates for rate in one[3:]]
    assert flat == sorted(flat, reverse=True)
    assert all(one[0] < one[1] < one[2] < one[3] for one in rates)
    assert step.learning_rate(settings.Training(warmup_steps=0), 0, 1, 1) == pytest.approx(1e-3)


# --- evaluation


def greedy_matches(model, examples):
    """Which examples' completions greedy generation writes exactly."""
    exact = []
    for example in examples:
        prompt = [token for token, label in zip(example.ids, example.labels, strict=True) if label == IGNORED]
        ids = torch.tensor([prompt])
        more = len(example.ids) - len(prompt)
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=more,
            max_new_tokens=more,
            do_sample=False,
        )
        exact.append(said[0].tolist() == example.ids)
    return exact


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_exact_match_is_what_greedy_generation_would_write(tiny, family):
    model = tiny(family)
    adapter = adapted(model, settings.Adapter(rank=8, alpha=16.0))
    examples = draw_examples(12)
    train(model, adapter, examples[:6], steps=60, rows_a_step=6, micro_rows=6, learning_rate=2e-2)
    score = evaluate(model, adapter, examples, micro_rows=5)
    exact = greedy_matches(model, examples)
    assert score.rows == 12
    assert score.accuracy == sum(exact) / 12
    assert 5 <= sum(exact) < 12
    # in the rows' order, though rows go through the model by length
    hits = np.unpackbits(np.frombuffer(score.hits, np.uint8), count=12).astype(bool).tolist()
    assert hits == exact
    by_length = sorted(range(12), key=lambda number: (len(examples[number].ids), number))
    assert hits != [exact[number] for number in by_length]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("micro_rows", [1, 5, 100])
def test_the_loss_of_an_evaluation_is_torchs(tiny, family, micro_rows):
    model, examples = tiny(family), draw_examples(12)
    adapter = adapted(model, SPEC)
    ids, labels = pad(examples, torch.device("cpu"))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    truth = float(torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))
    every_token = float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
    assert evaluate(model, adapter, examples, micro_rows).loss == pytest.approx(truth, rel=1e-5)
    assert every_token != pytest.approx(truth, rel=1e-3)


# --- the process


ROWS = [{"prompt": f"say {n}: ", "completion": f"{n} {n}"} for n in range(20)]


@pytest.fixture
def trainer(tmp_path, template):
    """trainer(name, facts, depth, **changes): runs one job as a device does; its folder and the ended process.

    alone: in a process that imports for itself, so that its memory is a device's.
    """

    def run(
        name, facts, depth=4, rank=SPEC.rank, rows=ROWS, method="fedit", own=None, alone=False, **changes
    ):
        folder = tmp_path / name
        folder.mkdir()
        plan = plan_of(model_class=facts.model_class, layers=facts.layers, depth=depth, rank=rank, rows=4)
        job = job_of(
            **{
                "train": True,
                "facts": facts,
                "plan": plan,
                "adapter": SPEC,
                "training": settings.Training(steps=3, rows_a_step=6, max_tokens=32),
                "method": settings.MethodChoice(method, own or {}),
                "seed": 5,
                "round": 1,
                "rounds": 2,
                "data": str(data.write_rows(folder / "rows.jsonl", rows)),
                "evaluation": {"own": str(data.write_rows(folder / "own.jsonl", ROWS[:4]))},
                "depths": (depth,),
                "threads": 1,
                **changes,
            }
        )
        (folder / "job.json").write_bytes(msgspec.json.encode(job))
        if not alone:
            return folder, template.run(folder)
        command = [sys.executable, "-m", "edge_runtime.trainer", str(folder)]
        return folder, subprocess.run(command, env=processes.environment(), capture_output=True, timeout=1000)

    return run


def result(ended):
    folder, process = ended
    assert process.returncode == 0, process.stderr.decode()
    return msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)


def decoded(ended):
    return codec.decode((ended[0] / "payload.bin").read_bytes())


TERMS = {
    "runtime": 350 << 20,
    "kernels": 40 << 20,
    "block": 1 << 30,
}  # of a plan that takes more than any lower one


def test_a_round_that_comes_near_its_budget_goes_on_in_less_memory(
    trainer, demo_facts, tmp_path, monkeypatch
):
    training = settings.Training(steps=3, rows_a_step=4, max_tokens=32)
    plan = plan_of(model_class=demo_facts.model_class, layers=30, depth=2, rows=4, terms=TERMS, tokens=256)
    limits = {"budget_bytes": 1 << 40, "training": training, "plan": plan}
    folder, _ = far = trainer("far", demo_facts, depth=2, **limits)
    assert result(far).easings == []
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    near, machine = tmp_path / "near", msgspec.structs.replace(job.machine, threads=0)
    near.mkdir()
    (near / "job.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(job, machine=machine)))
    lap, peaks = Meter.lap, iter([machine.budget_bytes] * 2)
    monkeypatch.setattr(
        Meter, "lap", lambda meter: lap(meter) if meter._phase != "train" else next(peaks, lap(meter))
    )
    run.run(near, run.Bases(), lambda progress: None)
    eased = result((near, subprocess.CompletedProcess([], 0)))
    (easing,) = eased.easings
    assert (easing.rows, easing.boundaries, easing.kept_blocks) == (1, "int8", 0)
    assert eased.losses == pytest.approx(result(far).losses, rel=1e-2)


def test_a_trainer_whose_steps_take_more_than_its_budget_says_what_they_took(trainer, demo_facts):
    plan = plan_of(model_class=demo_facts.model_class, layers=30, depth=2, rows=4, terms=TERMS)
    folder, ended = trainer("short", demo_facts, depth=2, budget_bytes=64 << 20, plan=plan, alone=True)
    assert ended.returncode == 6
    assert re.fullmatch(
        rb"a step took \d+(\.\d+)? MiB of a budget of 64 MiB, and was to take .*is needed\n", ended.stderr
    )
    assert not (folder / "result.json").exists()


def test_one_round_on_a_slice_of_the_demos_model(trainer, demo_facts):
    ended = trainer("a", demo_facts, depth=2, alone=True)
    done = result(ended)
    expected = adapter_shapes(demo_facts, (0, 29), SPEC.roles, SPEC.rank, FEDIT)
    assert {key: value.shape for key, value in decoded(ended).items()} == expected
    assert done.payload_bytes == (ended[0] / "payload.bin").stat().st_size
    assert (done.samples, done.evaluation["own"].rows, len(done.losses)) == (18, 4, 3)
    assert set(done.phases) == set(done.seconds) == {"load", "evaluate", "train", "encode"}
    assert done.measured_peak_bytes == max(phase.peak_bytes for phase in done.phases.values()) > 100 << 20
    assert not (ended[0] / "state.bin").exists()
    told = [msgspec.json.decode(line, type=Progress) for line in ended[1].stdout.splitlines()]
    assert [one.phase for one in told] == ["load", "evaluate own", *["train"] * 3, "encode", "done"]
    assert [(one.step, one.steps, one.loss) for one in told[2:5]] == [
        (n, 3, done.losses[n - 1]) for n in (1, 2, 3)
    ]
    assert all(one.memory_bytes > 100 << 20 for one in told)


def test_each_stage_frees_its_memory_before_the_next_needs_it(trainer, tiny_facts, tmp_path):
    """The tokenizer before the model is loaded, the round's start before training, the model before encoding."""
    folder, process = trainer("first", tiny_facts)
    assert process.returncode == 0
    again = tmp_path / "again"
    again.mkdir()
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    machine = msgspec.structs.replace(job.machine, threads=0)
    (again / "job.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(job, machine=machine)))
    alive, phases = {}, {}

    class Watched(run.Bases):
        def tokenizer(self, facts):
            tokenizer = super().tokenizer(facts)
            alive["tokenizer"] = weakref.ref(tokenizer)
            return tokenizer

        def model(self, facts, plan, device):
            phases["model"] = alive["tokenizer"]() is not None
            model = super().model(facts, plan, device)
            alive["model"] = weakref.ref(model)
            return model

    def say(progress):
        model = alive["model"]() is not None if "model" in alive else None
        phases[progress.phase] = model, (again / "start.bin").exists()

    run.run(again, Watched(), say)
    assert phases.pop("model") is False
    assert phases == {
        "load": (None, False),
        "evaluate own": (True, True),
        "train": (True, True),
        "encode": (False, True),
        "done": (False, False),
    }


def test_smaller_slices_take_turns_only_where_something_is_exchanged(trainer, tiny_facts):
    losses = {
        (method, depths): result(
            trainer(f"{method}{len(depths)}", tiny_facts, method=method, depths=depths)
        ).losses
        for method in ("fedit", "local")
        for depths in ((4,), (4, 2))
    }
    assert losses["local", (4, 2)] == losses["local", (4,)] == losses["fedit", (4,)]
    assert losses["fedit", (4, 2)][0] == losses["fedit", (4,)][0]
    assert losses["fedit", (4, 2)][1] != losses["fedit", (4,)][1]


def test_what_is_owed_travels_with_the_next_delta_and_nothing_is_lost(trainer, tiny_facts, tmp_path):
    """decoded payload + new residual = delta + what was owed, to float32's rounding."""
    first = trainer("first", tiny_facts)
    result(first)
    plain = decoded(first)
    draw = np.random.default_rng(0)
    owed = {key: draw.normal(0, 1e-3, value.shape).astype(np.float32) for key, value in plain.items()}
    save_file(owed, tmp_path / "residual.bin")
    unsent = str(first[0] / "payload.bin")
    second = trainer("second", tiny_facts, residual=str(tmp_path / "residual.bin"), unsent=unsent)
    result(second)
    kept = [load_file(ended[0] / "residual.bin") for ended in (first, second)]
    for key, sent in decoded(second).items():
        delta = plain[key] + kept[0][key]
        np.testing.assert_allclose(sent + kept[1][key], delta + owed[key] + plain[key], rtol=0, atol=1e-8)
        assert np.abs(sent - delta).max() > 1e-4  # without what was owed it is another payload
        assert np.linalg.norm(kept[1][key]) <= 0.7 * np.linalg.norm(sent)


def test_a_round_starts_from_the_global_version(trainer, tiny_facts, tmp_path):
    """An evaluation alone: its loss is that of the model with exactly this adapter."""
    draw = np.random.default_rng(0)
    shapes = adapter_shapes(tiny_facts, LAYERS, SPEC.roles, SPEC.rank, FEDIT)
    drawn = {key: draw.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
    changes = {key: draw.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
    (tmp_path / "next").write_bytes(codec.encode(changes, step=1.5))
    chain = (*chain_of(tmp_path / "start", drawn), str(tmp_path / "next"))
    ended = trainer("a", tiny_facts, depth=3, train=False, start=chain)
    seen = result(ended).evaluation["own"]
    assert not (ended[0] / "payload.bin").exists()

    from transformers import AutoTokenizer

    examples = Tokenization(
        AutoTokenizer.from_pretrained(tiny_facts.folder), tiny_facts.vocabulary, 32
    ).examples(ROWS[:4])
    model = weights.load(tiny_facts, 3, "float32")
    adapter = attach.attach(model, kept_layers(3, 4), SPEC, FEDIT, seed=5)
    untrained = evaluate(model, adapter, examples, 4)
    version = published(map(Path, chain), 5, FEDIT)
    attach.load_state(adapter, {key: version[key] for key in adapter.factors})
    assert seen.loss == pytest.approx(evaluate(model, adapter, examples, 4).loss, rel=1e-5)
    assert seen.loss != pytest.approx(untrained.loss, rel=1e-3)


def test_under_local_the_state_stays_on_the_device_and_goes_on_from_there(trainer, tiny_facts):
    first = trainer("first", tiny_facts, method="local")
    assert result(first).payload_bytes == 0
    assert not (first[0] / "payload.bin").exists() and not (first[0] / "residual.bin").exists()
    kept = load_file(first[0] / "state.bin")
    assert {key: value.shape for key, value in kept.items()} == adapter_shapes(
        tiny_facts, LAYERS, SPEC.roles, SPEC.rank, FEDIT
    )
    assert all(
        not np.array_equal(kept[key], initial(key, kept[key].shape, 5, FEDIT.factors[key[-1]]))
        for key in kept
    )
    second = trainer("second", tiny_facts, method="local", private=str(first[0] / "state.bin"), round=2)
    before, after = result(first).evaluation["own"].loss, result(second).evaluation["own"].loss
    assert after < before


def test_bad_data_ends_it_with_one_sentence(trainer, tiny_facts):
    folder, process = trainer("a", tiny_facts, rows=[{"text": "good"}, {"prompt": "a"}])
    assert process.returncode == 2
    said = process.stderr.decode()
    assert len(said.splitlines()) == 1 and "rows.jsonl, line 2: has prompt; needed" in said
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("name", ["private", "residual"])
def test_what_an_earlier_round_left_broken_is_named(trainer, tiny_facts, tmp_path, name):
    (tmp_path / "left.bin").write_bytes(b"not safetensors at all")
    _, process = trainer(name, tiny_facts, **{name: str(tmp_path / "left.bin")})
    assert process.returncode == 2
    assert process.stderr.decode().startswith(
        f"{tmp_path / 'left.bin'}, which an earlier round left, cannot be read"
    )


def test_the_private_state_of_another_model_is_left_aside(trainer, tiny_facts, tmp_path):
    save_file({"layers.0.q.A": np.ones((SPEC.rank, 5), np.float32)}, tmp_path / "state.bin")
    other = trainer("other", tiny_facts, method="local", private=str(tmp_path / "state.bin"), train=False)
    anew = trainer("anew", tiny_facts, method="local", train=False)
    assert result(other).evaluation == result(anew).evaluation


# --- a full disk


@pytest.mark.parametrize("times", [2, 1000])
def test_a_full_disk_is_waited_for_but_not_for_ever(tmp_path, monkeypatch, times):
    monkeypatch.setattr(disk, "POLL_S", 0.001)
    monkeypatch.setattr(disk, "WAIT_S", 0.5)
    told, tries = [], iter(range(times))

    def save(tensors, path):
        path.write_bytes(b"half")
        if next(tries, None) is not None:
            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"
            )
        save_file(tensors, path)

    monkeypatch.setattr(disk, "save_file", save)
    factors = {"layers.0.q.A": np.ones((2, 3), np.float32)}
    if times == 1000:
        with pytest.raises(TrainerError, match="on a disk that has been full for"):
            disk.save(tmp_path / "residual.bin", factors, told.append)
        assert not list(tmp_path.iterdir())
    else:
        disk.save(tmp_path / "residual.bin", factors, told.append)
        assert told == ["wait for disk space"] * 2
        assert np.array_equal(load_file(tmp_path / "residual.bin")["layers.0.q.A"], factors["layers.0.q.A"])


def test_another_failure_to_write_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(
        disk, "save_file", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied"))
    )
    with pytest.raises(PermissionError):
        disk.save(tmp_path / "residual.bin", {}, lambda _: None)


SENT = {"fedit": "AB", "ffa": "B", "fedsa": "A", "fedsb": "C"}
KEPT = {"fedsa": "B"}


@pytest.mark.parametrize("method", SENT)
def test_a_round_sends_what_the_method_shares_and_keeps_what_is_private(trainer, tiny_facts, method):
    folder, _ = first = trainer("first", tiny_facts, method=method)
    result(first)
    shapes = adapter_shapes(tiny_facts, LAYERS, SPEC.roles, SPEC.rank, methods.METHODS[method])
    assert {key: value.shape for key, value in decoded(first).items()} == {
        key: shape for key, shape in shapes.items() if key[-1] in SENT[method]
    }
    assert all(np.abs(value).max() > 0 for value in decoded(first).values())
    kept = load_file(folder / "state.bin") if method in KEPT else {}
    assert (folder / "state.bin").exists() is bool(kept)
    assert {key: value.shape for key, value in kept.items()} == {
        key: shape for key, shape in shapes.items() if key[-1] in KEPT.get(method, "")
    }


def test_the_private_part_goes_on_beside_the_shared_one(trainer, tiny_facts, tmp_path):
    first = trainer("first", tiny_facts, method="fedsa")
    before = result(first).evaluation["own"].loss
    start = (str(first[0] / "payload.bin"),)  # what a node with this device alone publishes
    private = str(first[0] / "state.bin")
    second = trainer("second", tiny_facts, method="fedsa", start=start, private=private, round=2)
    forgot = trainer("forgot", tiny_facts, method="fedsa", start=start, round=2)
    assert result(second).evaluation["own"].loss < before
    assert result(forgot).evaluation["own"].loss == pytest.approx(before, rel=1e-6)


def test_a_device_of_lower_rank_starts_from_the_leading_part_of_the_version(trainer, tiny_facts, tmp_path):
    """Its loss is that of the version whose other rows and columns are zero, and what it is owed in another rank counts."""
    draw = np.random.default_rng(0)
    shapes = adapter_shapes(tiny_facts, LAYERS, SPEC.roles, SPEC.rank, FEDIT)
    version = {key: draw.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
    cut = {
        key: value * (np.arange(SPEC.rank) < 1)[:, None]
        for key, value in version.items()
        if key.endswith("A")
    }
    start = chain_of(tmp_path / "version", version)
    zeros = chain_of(tmp_path / "zeros", {**version, **cut})
    (tmp_path / "owed").mkdir()
    owed = {key: np.full(shape, 1e-3, np.float32) for key, shape in shapes.items()}
    save_file(owed, tmp_path / "owed" / "residual.bin")

    first = trainer("low", tiny_facts, method="hetlora", rank=1, start=start)
    same = trainer("cut", tiny_facts, start=zeros, train=False)
    other = trainer("whole", tiny_facts, start=start, train=False)
    loss = result(first).evaluation["own"].loss
    assert loss == pytest.approx(result(same).evaluation["own"].loss, rel=1e-3)
    assert loss != pytest.approx(result(other).evaluation["own"].loss, rel=1e-3)
    assert {min(value.shape) for value in decoded(first).values()} == {1}
    residual = str(tmp_path / "owed" / "residual.bin")
    again = trainer("again", tiny_facts, method="hetlora", rank=1, start=start, residual=residual)
    kept = {key: [load_file(folder / "residual.bin")[key] for folder, _ in (first, again)] for key in shapes}
    for key, sent in decoded(again).items():
        np.testing.assert_allclose(
            sent + kept[key][1], decoded(first)[key] + kept[key][0] + 1e-3, rtol=0, atol=1e-7, err_msg=key
        )


@pytest.mark.parametrize(("rank", "depth"), [(1, 4), (2, 2)])
def test_private_factors_follow_a_device_to_another_rank_or_depth(trainer, tiny_facts, rank, depth):
    first = trainer("first", tiny_facts, method="local")
    result(first)
    private = str(first[0] / "state.bin")
    second = trainer("second", tiny_facts, depth=depth, method="local", rank=rank, private=private)
    anew = trainer("anew", tiny_facts, depth=depth, method="local", rank=rank)
    assert result(second).evaluation["own"].loss != pytest.approx(
        result(anew).evaluation["own"].loss, rel=1e-4
    )
    kept = load_file(second[0] / "state.bin")
    assert {key: value.shape for key, value in kept.items()} == adapter_shapes(
        tiny_facts, kept_layers(depth, 4), SPEC.roles, rank, FEDIT
    )


def test_a_device_that_prunes_sends_the_ranks_that_it_goes_on_with(trainer, tiny_facts, tmp_path):
    draw = np.random.default_rng(0)
    shapes = adapter_shapes(tiny_facts, LAYERS, SPEC.roles, SPEC.rank, FEDIT)
    version = {key: draw.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
    start, own = chain_of(tmp_path / "version", version), {"penalty": 1e3, "keep": 0.5}
    pruned = trainer("pruned", tiny_facts, method="hetlora", own=own, start=start)
    first = trainer("first", tiny_facts, method="hetlora", own=own)  # its B was zero
    whole = trainer("whole", tiny_facts, method="hetlora", start=start)
    assert [result(ended).rank for ended in (pruned, first, whole)] == [SPEC.rank // 2, SPEC.rank, None]
    for ended, rank in ((pruned, SPEC.rank // 2), (first, SPEC.rank), (whole, SPEC.rank)):
        lower = adapter_shapes(tiny_facts, LAYERS, SPEC.roles, rank, FEDIT)
        assert {key: value.shape for key, value in decoded(ended).items()} == lower
    fleet = settings.Fleet(
        "f", (settings.Model("m"),), adapter=SPEC, method=settings.MethodChoice("hetlora", own)
    )
    payload = (pruned[0] / "payload.bin").read_bytes()
    assert check.check(payload, {}, fleet, methods.of(fleet))
    with pytest.raises(InputError, match="of rank 4"):
        check.check(
            payload,
            {},
            msgspec.structs.replace(fleet, method=settings.MethodChoice("hetlora")),
            methods.METHODS["hetlora"],
        )


def test_what_flora_keeps_is_applied_and_frozen_and_a_round_begins_on_it_with_a_fresh_adapter(
    trainer, tiny_facts, tmp_path
):
    draw = np.random.default_rng(0)
    shapes = adapter_shapes(tiny_facts, LAYERS, SPEC.roles, SPEC.rank, FEDIT)
    learned = {key: draw.normal(0, 0.5, shape).astype(np.float32) for key, shape in shapes.items()}
    kept = {}
    for key, value in learned.items():  # the same in a higher rank
        beyond = [(0, 64 - SPEC.rank), (0, 0)] if key.endswith("A") else [(0, 0), (0, 64 - SPEC.rank)]
        kept[f"{key[:-1]}kept{key[-1]}"] = np.pad(value, beyond)
    kept, learned = (
        chain_of(tmp_path / name, state, method=methods.METHODS[name])
        for name, state in (("flora", kept), ("fedit", learned))
    )
    first = trainer("with flora", tiny_facts, method="flora", start=kept, round=2)
    same = trainer("with fedit", tiny_facts, start=learned, train=False)
    nothing = trainer("nothing", tiny_facts, train=False)
    loss = result(first).evaluation["own"].loss
    assert loss == pytest.approx(result(same).evaluation["own"].loss, rel=2e-3)
    assert loss != pytest.approx(result(nothing).evaluation["own"].loss, rel=6e-3)
    assert {parse(key).factor for key in decoded(first)} == {"A", "B"}
    assert all(np.abs(value).max() > 0 for value in decoded(first).values())


def test_what_is_of_a_layer_of_another_width_is_not_taken(trainer, tiny_facts, tmp_path):
    owed = {
        "layers.0.q.A": np.ones((SPEC.rank, 5), np.float32),
        "layers.0.q.B": np.ones((5, SPEC.rank), np.float32),
    }
    save_file(owed, tmp_path / "residual.bin")
    plain = trainer("plain", tiny_facts)
    other = trainer("other", tiny_facts, residual=str(tmp_path / "residual.bin"))
    assert [result(ended).payload_bytes for ended in (plain, other)]
    assert (plain[0] / "payload.bin").read_bytes() == (other[0] / "payload.bin").read_bytes()


def test_what_rounding_lost_of_other_factors_is_not_added(trainer, tiny_facts, tmp_path):
    shapes = adapter_shapes(tiny_facts, LAYERS, SPEC.roles, SPEC.rank, FEDIT)
    save_file(
        {key: np.full(shape, 1e-2, np.float32) for key, shape in shapes.items()}, tmp_path / "residual.bin"
    )
    payloads = {
        (method, residual): (
            trainer(f"{method}{bool(residual)}", tiny_facts, method=method, residual=residual)[0]
        )
        for method in ("fedit", "flexlora")
        for residual in (None, str(tmp_path / "residual.bin"))
    }
    sent = {key: (folder / "payload.bin").read_bytes() for key, folder in payloads.items()}
    assert len({sent["flexlora", residual] for _, residual in sent}) == 1
    assert len({sent["fedit", residual] for _, residual in sent}) == 2
