"""Frames from a layer's own weights, and cores between them that cross models."""

import msgspec
import numpy as np
import pytest
import torch
from architectures import RATES, SMOLLM2
from edge_kernels import expand, pack

from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.adapters.singular import frames
from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Contribution
from edge_runtime.planning.candidates import candidates, predicted
from edge_runtime.planning.predict import Workload

SINGULAR = settings.MethodChoice("fedsb", {"frames": "singular"})


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_the_leading_singular_vectors(shape, transposed):
    W = torch.from_numpy(np.random.default_rng(0).normal(0, 1, shape))
    W = W.T.contiguous().T if transposed else W  # as Conv1D's is seen
    _, s, vt = np.linalg.svd(W.numpy())
    A, B = frames(W.float(), 5)
    assert (A.shape, B.shape) == ((5, shape[1]), (shape[0], 5))
    for i in range(5):
        assert abs(float(A[i].double() @ torch.from_numpy(vt[i]))) == pytest.approx(3**-0.5, abs=1e-4)
        assert float(B[:, i].double() @ W @ A[i].double()) == pytest.approx(
            s[i] / 3, rel=1e-4
        )  # u and v are of one sign
        assert A[i, A[i].abs().argmax()] > 0


def test_a_packed_layers_are_those_of_its_own_values_and_missing_directions_are_zero():
    packed = pack(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), "q8_0")
    A, B = frames(packed, 12)
    whole, _ = frames(expand(packed, torch.float32), 8)
    torch.testing.assert_close(A[:8], whole)
    assert not A[8:].any() and not B[:, 8:].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_begins_with_them_frozen_and_changes_nothing(tiny, family):
    model, method = tiny(family), methods.build(SINGULAR, None, None)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapter = attach.attach(model, (0, 1, 2, 3), settings.Adapter(rank=4), method, seed=0)
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    trained = {key.rpartition(".")[2] for key, factor in adapter.factors.items() if factor.requires_grad}
    assert trained == {"C"}
    one = next(key for key in adapter.factors if key.endswith(".A"))
    torch.testing.assert_close(
        adapter.factors[one] @ adapter.factors[one].T, torch.eye(4) / 3, atol=1e-4, rtol=0
    )
    drawn = attach.attach(
        tiny(family), (0, 1, 2, 3), settings.Adapter(rank=4), methods.METHODS["fedsb"], seed=0
    )
    lengths = [
        float(one.factors[one_of].norm(dim=1).mean())
        for one in (adapter, drawn)
        for one_of in [next(iter(one.factors))]
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.15)  # a step on C moves the layer as far


def test_no_plan_streams_weights_that_frames_are_taken_of():
    model = settings.Model("m", weights=("q4_1",))
    fleet = settings.Fleet("f", (model,), method=SINGULAR)
    ways = [plan for some in candidates(fleet, {"m": SMOLLM2}, 0, RATES) for plan in some]
    drawn = msgspec.structs.replace(fleet, method=settings.MethodChoice("fedsb"))
    others = [plan for some in candidates(drawn, {"m": SMOLLM2}, 0, RATES) for plan in some]
    assert ways == [plan for plan in others if not plan.streamed] and len(ways) == len(others) - 1
    streamed = next(plan for plan in others if plan.streamed)
    with pytest.raises(
        InputError, match="fedsb takes frames from the model's weights, which cannot be streamed"
    ):
        predicted(Workload(fleet, SMOLLM2, 0), RATES, streamed)


def test_a_core_of_a_stage_is_the_mean_over_all_models_or_inside_each():
    keys = {}
    for across in (True, False):
        own = {"stages": 8, "across": across}
        method = methods.build(settings.MethodChoice("fedsb", own), None, None)
        assert method.scope("stages") == ("fleet" if across else "class") and "layers" not in method.merges
        keys[across] = [method.keys(layer, 8, "q")["C"] for layer in range(8)]
        assert keys[across] == [f"stages.{layer}.q.C" for layer in range(8)]
        assert [method.keys(layer, 5, "q")["C"] for layer in range(5)] == [
            f"stages.{s}.q.C" for s in (0, 2, 4, 6, 7)
        ]
    key = "stages.2.q.C"
    ones = np.ones((2, 2), np.float32)
    made = [
        Contribution({key: 0 * ones}, {key: value * ones}, rows, of)
        for value, rows, of in ((1, 10, "m"), (4, 20, "n"))
    ]
    np.testing.assert_allclose(method.merges["stages"](lambda: made)[key], 3 * ones)


def test_cores_cross_models_by_depth_and_not_by_a_layers_number():
    with pytest.raises(InputError, match="`across` needs `stages`"):
        methods.build(settings.MethodChoice("fedsb", {"across": True}), None, None)
