"""PreLort's segments on the node, and its turns between leading ranks on a device."""

import numpy as np
from test_adapters import IDS, LAYERS
from test_training import draw_examples

from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.methods.interface import Contribution
from edge_runtime.trainer import step

METHOD = methods.METHODS["prelort"]
SPEC = settings.Adapter(rank=4, alpha=8.0)


def device(seed, rank, samples):
    draw = np.random.default_rng(seed)
    shapes = {"layers.0.q.A": (rank, 6), "layers.0.q.B": (5, rank)}
    delta = {key: draw.normal(0, 1, shape).astype(np.float32) for key, shape in shapes.items()}
    return Contribution(
        {"layers.0.q.A": np.ones((4, 6), np.float32), "layers.0.q.B": np.ones((5, 4), np.float32)},
        delta,
        samples,
    )


def test_a_segment_is_averaged_over_the_devices_that_hold_it():
    devices = [device(0, 4, 30), device(1, 2, 10), device(2, 1, 60)]
    seen = METHOD.merges["layers"](lambda: iter(devices))
    back = METHOD.merges["layers"](lambda: iter(devices[::-1]))
    for first, end in ((0, 1), (1, 2), (2, 4)):
        holders = [each for each in devices if len(each.delta["layers.0.q.A"]) >= end]
        rows = sum(each.samples for each in holders)
        for key, part in (("layers.0.q.A", np.s_[first:end]), ("layers.0.q.B", np.s_[:, first:end])):
            truth = sum(each.samples * each.delta[key][part].astype(np.float64) for each in holders) / rows
            for step_ in (seen, back):
                np.testing.assert_allclose(step_[key][part], truth, atol=1e-6)
            diluted = truth * rows / 100  # as if every device held it
            assert bool(np.abs(seen[key][part] - diluted).max() > 0.1) is (rows < 100)


def trained(tiny, ranks, steps):
    """The adapter's state before and after some steps that take turns in these ranks, and its model."""
    model = tiny("llama")
    adapter = attach.attach(model, LAYERS, SPEC, METHOD, seed=0)
    before = attach.state(adapter)
    training = settings.Training(steps=steps, rows_a_step=8, learning_rate=3e-2)
    turns = step.RoundSettings(training, [(0, 1, 2, 3)], ranks=ranks)
    learner = step.Learner(model, adapter, draw_examples(8), turns)
    losses = [learner.step(8) for _ in range(steps)]
    learner.close()
    return before, attach.state(adapter), losses, model


def test_a_step_in_a_lower_rank_trains_the_leading_part_alone(tiny):
    before, after, _, model = trained(tiny, (2,), 2)
    for key, value in after.items():
        moved = value != before[key]
        assert moved[:2].any() and not moved[2:].any() if key.endswith("A") else not moved[:, 2:].any()
    assert any(after[key][:, :2].any() for key in after if key.endswith("B"))
    model(IDS)
    linears = [module for module in model.modules() if isinstance(module, attach.AdapterLinear)]
    assert all(linear.leading is None for linear in linears)  # between steps the adapter is whole


def test_turns_leave_a_leading_part_that_works_alone(tiny):
    """The loss in rank 1 after training in turns, beside after training in full rank alone."""
    losses = {}
    for name, ranks in (("turns", (None, 1)), ("whole", (None,))):
        _, after, _, _ = trained(tiny, ranks, 8)
        model = tiny("llama")
        adapter = attach.attach(model, LAYERS, SPEC, METHOD, seed=0)
        cut = {key: value.copy() for key, value in after.items()}
        for key, value in cut.items():
            if key.endswith("B"):
                value[:, 1:] = 0
        attach.load_state(adapter, cut)
        still = settings.Training(steps=1, rows_a_step=8, learning_rate=1e-9)
        learner = step.Learner(model, adapter, draw_examples(8), step.RoundSettings(still, [(0, 1, 2, 3)]))
        losses[name] = learner.step(8)
    assert losses["turns"] < 0.9 * losses["whole"]


def test_a_device_takes_turns_in_the_lower_ranks_of_its_fleet():
    assert METHOD.turns(8, (8, 4, 2)) == (None, 4, 2)
    assert METHOD.turns(2, (8, 4, 2)) == METHOD.turns(2, ()) == (None,)
    assert methods.METHODS["hetlora"].turns(8, (8, 4, 2)) == (None,)
