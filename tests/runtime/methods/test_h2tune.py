"""H2Tune's core, relation, selection and two passes, and the divergence of outputs, against their equations."""

import types
import weakref

import numpy as np
import pytest
import torch
from edge_kernels import LanguageHead, expand, pack
from safetensors.numpy import load_file, save_file
from test_adapters import IDS, LAYERS, difference, logits, random_state
from test_training import draw_examples

from edge_runtime import methods, settings
from edge_runtime.adapters import attach
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator import check, merge
from edge_runtime.errors import InputError
from edge_runtime.methods import frames, h2tune
from edge_runtime.methods.interface import Contribution
from edge_runtime.protocol import codec
from edge_runtime.protocol.round import FLEET
from edge_runtime.trainer import data, step
from edge_runtime.trainer.vocabulary import Divergence

SPEC = settings.Adapter(rank=4, alpha=12.0)
METHOD = h2tune.H2Tune(rank=3, depths=3).method()


@pytest.mark.parametrize(("depth", "truth"), [(0.0, (1, 0, 0)), (0.25, (0.5, 0.5, 0)), (1.0, (0, 0, 1))])
def test_a_layer_begins_between_the_points_next_to_it(depth, truth):
    assert h2tune.relation(torch.zeros(3), depth).tolist() == pytest.approx(truth)


def test_a_relation_adds_up_to_one_whatever_was_learned():
    found = h2tune.relation(torch.tensor([0.4, -1.5, 3.0]), 0.7)
    assert float(found.sum()) == pytest.approx(1)


def test_a_layers_core_is_the_relations_share_of_each_increment():
    draw = torch.Generator().manual_seed(0)
    S, D = torch.randn(3, 4, 4, generator=draw), torch.randn(3, generator=draw)
    P = h2tune.relation(D, 0.3)
    truth = sum(P[m] * S[m] for m in range(3))
    assert torch.allclose(h2tune.inner({"S": S, "D": D}, 0.3), truth, atol=1e-6)


def test_each_entry_is_the_mean_over_the_devices_that_trained_it_whatever_their_model():
    steps = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    before = {f"stages.0.{role}.S": np.zeros((3, 3, 3), np.float32) for role in "qk"}
    devices = [
        Contribution(before, {"stages.0.q.S": steps[0], "stages.0.k.S": steps[0]}, 30, "m"),
        Contribution(before, {"stages.0.q.S": steps[1]}, 10, "n"),
    ]
    merged = METHOD.merges["stages"](lambda: iter(devices))
    np.testing.assert_allclose(merged["stages.0.q.S"], 0.75 * steps[0] + 0.25 * steps[1], atol=1e-6)
    np.testing.assert_allclose(merged["stages.0.k.S"], steps[0], atol=1e-6)


def test_version_0_changes_nothing_and_all_layers_share_one_s(tiny):
    model, plain = tiny("llama"), logits(tiny("llama"))
    adapter = attach.attach(model, LAYERS, SPEC, METHOD, seed=0)
    assert difference(plain, logits(model)) < 1e-6
    assert [key for key in adapter.factors if key.endswith("q.S")] == ["stages.0.q.S"]
    attach.load_state(adapter, random_state(adapter))
    model(IDS, labels=IDS).loss.backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in adapter.trained())


def trained(tiny, passes, steps=3, chosen=(0, 1, 2, 3), parts=()):
    """The state before some steps and after them, and the losses.

    chosen: blocks that the steps go through. parts: keys and entries of factors that train in part.
    """
    model = tiny("llama")
    adapter = attach.attach(model, LAYERS, SPEC, METHOD, seed=0)
    values = random_state(adapter)
    attach.load_state(adapter, {key: 0.1 * value for key, value in values.items()})
    before = attach.state(adapter)
    for key, entries in parts:
        adapter.train_part(key, entries)
    training = settings.Training(steps=steps, rows_a_step=8, learning_rate=1e-2)
    round_settings = step.RoundSettings(training, [chosen], passes=passes)
    learner = step.Learner(model, adapter, draw_examples(8), round_settings)
    losses = [learner.step(3) for _ in range(steps)]
    return before, attach.state(adapter), losses


def changed(tiny, passes, steps=3, chosen=(0, 1, 2, 3)):
    """Which factors some steps move, and the losses."""
    before, after, losses = trained(tiny, passes, steps, chosen)
    moved = {key for key in after if not np.array_equal(after[key], before[key])}
    assert all(int(key.split(".")[1]) in chosen for key in moved if key.startswith("layers"))
    return {key.rpartition(".")[2] for key in moved}, losses


def test_the_first_round_of_training_trains_all_and_later_ones_by_turns(tiny):
    assert [len(METHOD.passes(round_)) for round_ in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert changed(tiny, METHOD.passes(2))[0] == set("ABSD")
    shared, own = METHOD.passes(3)
    assert changed(tiny, [shared])[0] == set("SD")
    moved, losses = changed(tiny, [own._replace(apart=0.0)])
    assert moved == set("AB")
    moved, both = changed(tiny, METHOD.passes(3), steps=6)
    assert moved == set("ABSD")
    # the loss is that of the first pass, before anything moved
    assert both[0] == pytest.approx(losses[0], rel=1e-5)
    assert both[-1] < both[0]


def test_the_penalties_hold_the_cores_and_the_outputs(tiny):
    """Far heavier weights leave what they are on nearly where it was."""
    free = h2tune.H2Tune(rank=3, depths=3, norm=0.0, keep=0.0, apart=0.0).method().passes(3)
    held = h2tune.H2Tune(rank=3, depths=3, norm=0.0, keep=0.0, apart=1e3).method().passes(3)
    assert changed(tiny, held, steps=6)[1][-1] > changed(tiny, free, steps=12)[1][-1]
    kept = h2tune.H2Tune(rank=3, depths=3, norm=0.0, keep=1e4, apart=0.0).method().passes(3)
    distances = []
    for passes in (free, kept):
        before, after, _ = trained(tiny, passes[:1], steps=6)
        distances.append(sum(np.abs(after[key] - before[key]).sum() for key in after if key.endswith(".S")))
    assert distances[1] < 0.5 * distances[0]


def test_layers_that_a_step_leaves_out_are_not_penalised(tiny):
    strong = h2tune.H2Tune(rank=3, depths=3, norm=1e3).method().passes(3)
    assert changed(tiny, strong, chosen=(0, 3))[0] == set("ABSD")


def cores(seed, count=2, rank=16, scale=1.0):
    """Layers' whole cores: the identity between A and B, and T."""
    draw = torch.Generator().manual_seed(seed)
    T = [scale * torch.randn(rank, rank, generator=draw) for _ in range(count)]
    return T, [torch.block_diag(torch.eye(4), each) for each in T]


def penalty(settings_, round_, now, before):
    return settings_.method().passes(round_)[0].penalty([(None, C, None) for C in now], before)


def test_the_penalties_are_their_equations():
    (old, before), (new, now) = cores(0), cores(1)
    norms = sum(float(T.double().norm()) for T in new) / 2
    moved = sum(
        float((T - start).double().square().sum() / start.double().square().sum())
        for start, T in zip(old, new, strict=True)
    )
    weighed = h2tune.H2Tune(norm=0.5, keep=2.0)
    assert float(penalty(weighed, 2, now, before)) == pytest.approx(0.5 * norms, rel=1e-5)
    assert float(penalty(weighed, 3, now, before)) == pytest.approx(0.5 * norms + moved, rel=1e-5)
    released = h2tune.H2Tune(preset="as-released")
    assert float(penalty(released, 2, now, before)) == pytest.approx(norms, rel=1e-5)


def test_what_keeps_the_cores_has_a_gradient_of_the_size_of_their_change():
    """A change of a tenth pulls back by 2 · 0.1 / ‖T‖; the KL of the released code by next to nothing."""
    (start,), before = cores(0, count=1, scale=0.05)
    change = 0.1 * start
    T = (start + change).requires_grad_()
    penalty(h2tune.H2Tune(norm=0.0), 3, [torch.block_diag(torch.eye(4), T)], before).backward()
    assert torch.allclose(T.grad, 2 * change / start.square().sum(), rtol=1e-4)
    softmaxes = start.flatten().softmax(0), (moved := (start + change).requires_grad_()).flatten()
    torch.nn.functional.kl_div(softmaxes[1].log_softmax(0), softmaxes[0], reduction="sum").backward()
    assert moved.grad.norm() < 0.01 * T.grad.norm()


@pytest.mark.parametrize("round_", [2, 3])
def test_a_penalty_holds_no_product_but_the_last(tiny, round_):
    """A product is a copy of a layer's factors: of all layers together they would be a second adapter."""
    attach.attach(model := tiny("llama"), LAYERS, SPEC, METHOD, seed=0)
    linears = [module for module in model.modules() if isinstance(module, attach.AdapterLinear)]
    joined, alive = [], []

    def products():
        for linear in linears:
            product = linear.product()
            joined.append(weakref.ref(product[0]))
            yield product
            alive.append(sum(A() is not None for A in joined[:-1]))

    cores = [linear.product()[1].detach() for linear in linears]
    loss = METHOD.passes(round_)[0].penalty(products(), cores)
    assert loss.requires_grad and len(alive) == len(linears) > 20 and not any(alive)
    every = list(products())
    assert alive[-1] == len(every) - 1


def test_a_core_that_starts_from_0_has_nothing_to_keep():
    T = torch.full((16, 16), 1e-3, requires_grad=True)
    start = [torch.block_diag(torch.eye(4), torch.zeros(16, 16))]
    penalty(h2tune.H2Tune(norm=0.0), 3, [torch.block_diag(torch.eye(4), T)], start).backward()
    assert not T.grad.any()


def test_its_controls_exchange_less_and_train_in_the_same_passes():
    control = methods.build(settings.MethodChoice("h2tune", {"across": False}))
    assert (METHOD.scope("stages"), control.scope("stages")) == ("fleet", "class")
    private = methods.build(settings.MethodChoice("h2tune", {"core": "private"}))
    assert not private.merges and private.factors["S"].private and private.aligned
    for method in (control, private):
        first, second = method.passes(3)
        assert (first.frozen, second.frozen) == (frozenset("ABH"), frozenset("SD"))
        assert first.penalty is not None and second.apart > 0


# --- what a device of a lower rank trains


def selected(S, share, select):
    return h2tune.H2Tune(select=select).method().factors["S"].chosen(S, share)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("rank", "k"), [(8, 4), (4, 2), (6, 3), (1, 1)])
def test_a_device_trains_the_leading_or_the_largest_entries_by_its_share_of_the_fleets_rank(rank, k):
    S = drawn(3, 8, 8)
    leading, top = (selected(S, rank / 16, select) for select in ("leading", "top"))
    assert (leading.sum((1, 2)) == k * k).all() and leading[:, :k, :k].all()
    for matrix, entries in zip(S, top, strict=True):
        assert entries.sum() == k * k
        assert np.abs(matrix[entries]).min() >= np.abs(matrix[~entries]).max()
    assert not np.array_equal(leading, top)
    assert h2tune.METHOD.factors["S"].chosen is None  # the default: all


def test_equal_entries_are_taken_from_the_leading_rows_and_columns_on():
    zeros = np.zeros((2, 8, 8), np.float32)
    assert np.array_equal(selected(zeros, 0.5, "top"), selected(zeros, 0.5, "leading"))
    single = zeros.copy()
    single[0, 6, 7] = -1
    entries = selected(single, 0.25, "top")
    assert sorted(zip(*np.nonzero(entries[0]), strict=True)) == [(0, 0), (0, 1), (1, 0), (6, 7)]


def test_the_entries_that_a_device_does_not_train_stay_in_every_pass(tiny):
    entries = selected(drawn(3, 3, 3), 2 / 3, "top")
    part, other = "stages.0.q.S", "stages.0.k.S"
    before, after, _ = trained(tiny, METHOD.passes(3), steps=2, parts=[(part, entries)])
    assert np.array_equal(after[part] != before[part], entries)
    assert (after[other] != before[other]).all()


def test_an_entry_is_averaged_over_the_devices_that_trained_it_and_no_others():
    """A third of the rows is of a device that trained a part; the rest of S is the other's step, whole."""
    part, whole = drawn(3, 3, 3), drawn(3, 3, 3, seed=1)
    entries = selected(drawn(3, 3, 3, seed=2), 2 / 3, "top")
    key = "stages.0.q.S"
    before = {key: np.zeros((3, 3, 3), np.float32)}
    devices = [
        Contribution(before, {key: part * entries}, 10, "m", {key: entries}),
        Contribution(before, {key: whole}, 20, "n"),
    ]
    truth = np.where(entries, (part + 2 * whole) / 3, whole)
    for order in (devices, devices[::-1]):
        merged = METHOD.merges["stages"](lambda order=order: iter(order))[key]
        np.testing.assert_allclose(merged, truth, atol=1e-6)
    by_all = (part * entries + 2 * whole) / 3
    assert np.abs(by_all - truth)[~entries].min() > 1e-3
    # a part that says more than it trained; and what nobody trained
    lies = [devices[0]._replace(delta={key: part})]
    np.testing.assert_allclose(METHOD.merges["stages"](lambda: iter(lies))[key], part * entries, atol=1e-6)


def fleet_of(select, **changes):
    return settings.Fleet(
        "f",
        (settings.Model("m"),),
        method=settings.MethodChoice("h2tune", {"select": select, "rank": 8, "depths": 3}),
        adapter=settings.Adapter(rank=16, lower=(8,), roles=("q",)),
        public=settings.Public("texts.jsonl", 30),
        **changes,
    )


KEY = "stages.0.q.S"


def update(path, delta, model_class, rank=0):
    path.write_bytes(codec.encode({KEY: delta}, rank=rank))
    manifest = types.SimpleNamespace(model_class=model_class, samples=10)
    return types.SimpleNamespace(manifest=manifest, payload=path)


@pytest.mark.parametrize("select", ["leading", "top"])
def test_the_node_selects_as_a_device_does_by_the_version_that_was_published(tmp_path, select):
    fleet = fleet_of(select, codec=settings.Codec(step=4.0))
    method = methods.build(fleet.method)  # no features travel
    versions = {}

    def merged(number, *updates):
        new = merge.merge(list(updates), versions, fleet, method, number, tmp_path / str(number))
        versions.update({version.model_class: version for version in new})
        return load_file(versions[FLEET].master)[KEY]

    master = merged(
        1, update(tmp_path / "1a", drawn(3, 8, 8), "m@1"), update(tmp_path / "1b", drawn(3, 8, 8), "n@2")
    )
    start = published(versions["m@1"].chain, fleet.seed, method)[KEY]
    entries, of_master = (selected(S, 0.5, select) for S in (start, master))
    assert np.array_equal(entries, of_master) is (
        select == "leading"
    )  # rounding has made other entries large
    part, whole = drawn(3, 8, 8, seed=3), drawn(3, 8, 8, seed=4)
    updates = [update(tmp_path / "2a", part * entries, "m@1", rank=8), update(tmp_path / "2b", whole, "n@2")]
    part, whole = (codec.decode(each.payload.read_bytes())[KEY] for each in updates)
    step_ = merged(2, *updates) - master
    np.testing.assert_allclose(step_, np.where(entries, (part + whole) / 2, whole), atol=1e-5)


@pytest.mark.parametrize(("select", "taken"), [("top", "8,"), ("leading", "8,"), ("all", "")])
def test_a_part_of_a_rank_whose_devices_train_none_is_refused(select, taken):
    fleet = fleet_of(select)
    method, delta = methods.build(fleet.method), {KEY: drawn(3, 8, 8)}
    for rank in (0, 4, 8, 16):
        payload = codec.encode(delta, rank=rank)
        if rank == 0 or (taken and rank == 8):
            assert check.check(payload, {}, fleet, method).keys() == {KEY}
            continue
        reason = rf"of rank {rank} that trained a part, but the ranks that do are \({taken}\)"
        with pytest.raises(InputError, match=reason):
            check.check(payload, {}, fleet, method)


ROWS = [{"text": f"{word} {n}", "label": word} for n in range(6) for word in ("red", "green")]
PUBLIC = [{"text": f"{word} {n}"} for n in range(10, 25) for word in ("red", "green")]


@pytest.fixture
def round_3(trained, tmp_path):
    """round_3(name, select, rank, lower, **changes): a device's third round in a trainer process; its payload and residual."""
    version = {"frame.Z": drawn(30, frames.WIDTH), KEY: drawn(3, 4, 4)}
    start = tmp_path / "start"
    start.write_bytes(codec.encode(version))
    texts = str(data.write_rows(tmp_path / "texts.jsonl", PUBLIC))

    def run(name, select, rank, lower=(), **changes):
        choice = settings.MethodChoice("h2tune", {"select": select, "rank": 4, "depths": 3})
        fleet = {
            "method": choice,
            "adapter": settings.Adapter(rank=rank, lower=lower, roles=("q",)),
            "training": settings.Training(
                steps=3, rows_a_step=8, learning_rate=2e-2, weight_decay=0.1, max_tokens=32
            ),
            "head": settings.Head("fleet"),
            "public": settings.Public("", len(PUBLIC)),
            "texts": texts,
            "start": (str(start),),
            "round": 3,
            "rounds": 3,
        }
        folder, _ = trained(name, ROWS, ROWS, **fleet | changes)
        return (folder / "payload.bin").read_bytes(), load_file(folder / "residual.bin")

    return run, codec.decode(start.read_bytes())[KEY]


def test_a_device_of_a_lower_rank_sends_what_it_trained_and_owes_the_others_on(round_3, tmp_path):
    run, version = round_3
    owed, refused = drawn(3, 4, 4, seed=5), drawn(3, 4, 4, seed=6)
    save_file({KEY: owed}, tmp_path / "residual.bin")
    (tmp_path / "unsent.bin").write_bytes(codec.encode({KEY: refused}))
    refused = codec.decode((tmp_path / "unsent.bin").read_bytes())[KEY]
    carried = {"residual": str(tmp_path / "residual.bin"), "unsent": str(tmp_path / "unsent.bin")}
    entries = {}
    for select in ("leading", "top"):
        entries[select] = chosen = selected(version, 0.5, select)
        payload, residual = run(select, select, 4, (2,), **carried)
        sent = codec.decode(payload)[KEY]
        assert codec.rank(payload) == 2 and sent[chosen].any() and not sent[~chosen].any()
        np.testing.assert_array_equal(residual[KEY][~chosen], (owed + refused)[~chosen])
        moved = residual[KEY] + sent - owed - refused
        assert np.abs(moved[chosen]).min() > 0  # in two passes, one of which leaves S out
    assert not np.array_equal(entries["leading"], entries["top"])


@pytest.mark.parametrize("lower", [(), (1,)])
def test_a_device_of_the_fleets_rank_trains_and_sends_all_whatever_is_selected(round_3, lower):
    run, _ = round_3
    (every, owed), (top, owed_by_top) = (run(select, select, 2, lower) for select in ("all", "top"))
    assert every == top and codec.rank(every) == 0
    assert all(np.array_equal(value, owed_by_top[key]) for key, value in owed.items())


# --- the divergence of outputs


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk_bytes", [1, 4096, 1 << 20])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_divergence_is_torchs_with_its_gradient(softcap, chunk_bytes, packed, biased):
    draw = torch.Generator().manual_seed(0)
    before, hidden, head = (torch.randn(*shape, generator=draw) for shape in ((7, 64), (7, 64), (600, 64)))
    held = pack(head, "q8_0") if packed else head
    dense = (expand(held, torch.float32) if packed else head).double()
    hidden.requires_grad_(True)
    bias = 3 * torch.randn(600, generator=draw) if biased else None
    found = Divergence.apply(before, hidden, LanguageHead(held, bias, softcap), chunk_bytes)
    (3 * found).backward()
    truth_of = hidden.detach().double().requires_grad_(True)

    def logs(state):
        z = state @ dense.T + (0 if bias is None else bias.double())
        return (z if softcap is None else softcap * (z / softcap).tanh()).log_softmax(-1)

    truth = torch.nn.functional.kl_div(
        logs(truth_of), logs(before.double()), log_target=True, reduction="batchmean"
    )
    (3 * truth).backward()
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)
    assert torch.allclose(hidden.grad.double(), truth_of.grad, atol=1e-5)


def test_nothing_has_moved_where_nothing_changed():
    rows, head = torch.randn(4, 16), LanguageHead(torch.randn(50, 16))
    assert Divergence.apply(rows, rows.clone().requires_grad_(True), head, 1 << 20).item() == pytest.approx(
        0, abs=1e-6
    )
    empty = Divergence.apply(rows[:0], rows[:0].clone().requires_grad_(True), head, 1 << 20)
    assert float(empty) == 0
