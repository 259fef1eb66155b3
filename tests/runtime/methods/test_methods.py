"""What the node makes of the devices' deltas, against a dense computation in float64."""

import tracemalloc

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edge_runtime import cli, methods, settings
from edge_runtime.errors import InputError
from edge_runtime.methods import codistill, fedit
from edge_runtime.methods.interface import Contribution

SHAPES = {"layers.0.q.A": (4, 32), "layers.0.q.B": (48, 4), "layers.7.q.A": (4, 32), "layers.7.q.B": (48, 4)}


ZEROS = {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}


def delta(seed, keys=tuple(SHAPES)):
    draw = np.random.default_rng(seed)
    return {key: draw.normal(0, 1, SHAPES[key]).astype(np.float32) for key in keys}


def merged(updates):
    """What fedit makes of (delta, samples) pairs."""
    return fedit.METHOD.merges["layers"](
        lambda: (Contribution(ZEROS, one, samples) for one, samples in updates)
    )


def reference(updates):
    """Σ p_k d_k with p_k = n_k / Σ n over the holders of each tensor, all at once and in float64."""
    found = {}
    for key in {key for one, _ in updates for key in one}:
        held = [(one[key].astype(np.float64), samples) for one, samples in updates if key in one]
        shares = np.array([samples for _, samples in held]) / sum(samples for _, samples in held)
        found[key] = np.tensordot(shares, np.stack([value for value, _ in held]), axes=1)
    return found


def assert_same(seen, truth):
    assert seen.keys() == truth.keys()
    for key in truth:
        assert seen[key].dtype == np.float32
        np.testing.assert_allclose(seen[key], truth[key], rtol=0, atol=1e-6, err_msg=key)


def test_fedit_is_the_mean_weighted_by_rows():
    updates = [(delta(0), 200), (delta(1), 31), (delta(2), 1)]
    assert_same(merged(updates), reference(updates))


def test_a_tensor_is_averaged_over_the_devices_that_hold_it():
    shallow = [key for key in SHAPES if key.startswith("layers.0.")]
    updates = [(delta(0), 10), (delta(1, shallow), 30), (delta(2, shallow), 7)]
    seen = merged(updates)
    assert_same(seen, reference(updates))
    np.testing.assert_allclose(seen["layers.7.q.A"], updates[0][0]["layers.7.q.A"], rtol=1e-6)


@pytest.mark.parametrize("fault", ["unweighted", "over all devices", "one forgotten"])
def test_the_comparison_sees_a_wrong_mean(fault):
    shallow = [key for key in SHAPES if key.startswith("layers.0.")]
    updates = [(delta(0), 10), (delta(1, shallow), 30), (delta(2), 7)]
    wrong = {
        "unweighted": [(one, 1) for one, _ in updates],
        "over all devices": [
            ({**{key: 0 * value for key, value in delta(0).items()}, **one}, n) for one, n in updates
        ],
        "one forgotten": updates[:2],
    }[fault]
    with pytest.raises(AssertionError):
        assert_same(merged(wrong), reference(updates))


def test_equal_devices_get_the_plain_mean_and_their_order_is_nothing():
    deltas = [delta(seed) for seed in range(4)]
    forth = merged([(one, 50) for one in deltas])
    back = merged([(one, 50) for one in reversed(deltas)])
    plain = {key: np.mean([one[key] for one in deltas], axis=0) for key in SHAPES}
    assert_same(forth, plain)
    assert_same(back, plain)


def test_devices_that_agree_are_followed_and_a_single_one_is_too():
    one = delta(0)
    assert_same(merged([(one, 3), (one, 500), (one, 11)]), one)
    assert_same(merged([(one, 3)]), one)


def test_the_deltas_that_came_in_are_left_as_they_were():
    first, second = delta(0), delta(1)
    merged([(first, 2), (second, 3)])
    assert_same(first, delta(0))
    assert_same(second, delta(1))


def test_a_round_without_updates_changes_nothing():
    assert merged([]) == {}


ONE_UPDATE = 2 * 256 * 256 * 4


LARGE = {f"layers.0.q.{name}": (256, 256) for name in "AB"}


def peak_bytes(merge, updates, shapes=LARGE):
    """Memory that merging so many updates takes at its peak, each update a fresh one."""
    big = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}

    def contributions():
        for _ in range(updates):
            yield Contribution(big, {key: value.copy() for key, value in big.items()}, 1)

    tracemalloc.start()
    merge(contributions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "name", [name for name, method in methods.METHODS.items() if "layers" in method.merges]
)
def test_memory_does_not_grow_with_the_number_of_updates(name):
    merge = methods.METHODS[name].merges["layers"]
    peak_bytes(merge, 1)  # what is imported for it stays
    assert peak_bytes(merge, 40) - peak_bytes(merge, 2) < ONE_UPDATE / 2


@pytest.mark.parametrize(
    ("merge", "shapes"),
    [
        (
            methods.METHODS["heterotune"].merges["stages"],
            {f"stages.{stage}.q.C": (256, 256) for stage in (0, 1)},
        ),
        (methods.METHODS["h2tune"].merges["stages"], {f"stages.{stage}.q.S": (256, 256) for stage in (0, 1)}),
        (codistill.combined, {f"anchors.{label}.P": (1, 256 * 256) for label in "ab"}),
    ],
    ids=["heterotune", "h2tune", "codistill"],
)
def test_nor_does_that_of_what_crosses_models(merge, shapes):
    peak_bytes(merge, 1, shapes)
    assert peak_bytes(merge, 40, shapes) - peak_bytes(merge, 2, shapes) < ONE_UPDATE / 2


def test_the_measure_of_memory_sees_a_merge_that_keeps_all():
    assert peak_bytes(lambda contributions: list(contributions()), 40) > 38 * ONE_UPDATE


FACTORS = {  # what each method sends, keeps and freezes
    "local": ("", "AB", ""),
    "fedit": ("AB", "", ""),
    "fedrot": ("AB", "", ""),
    "prelort": ("AB", "", ""),
    "ffa": ("B", "", "A"),
    "fedsa": ("A", "B", ""),
    "fedsb": ("C", "", "AB"),
    "hetlora": ("AB", "", ""),
    "flexlora": ("AB", "", ""),
    "flora": ("AB", "", ("keptA", "keptB")),
    "h2tune": ("S", "ABD", "FG"),
    "fedadapter": ("ABUV", "", ""),
    "heterotune": ("ABC", "", "FG"),
    "colora": ("ABR", "Rw", "FGNO"),  # R is sent, and each device goes on with its own
}


def test_each_factor_is_sent_kept_or_frozen():
    assert FACTORS.keys() == methods.METHODS.keys()
    for name, (sent, kept, frozen) in FACTORS.items():
        method = methods.METHODS[name]
        assert method.factors.keys() == {*sent, *kept, *frozen}
        for factor in method.factors:
            key = f"layers.0.q.{factor}"
            assert (method.factor(key).exchanged, method.factor(key).private) == (
                factor in sent,
                factor in kept,
            )
        assert bool(method.merges) is bool(sent)
        assert "zero" in {factor.start for factor in method.factors.values()}  # version 0 changes nothing


def products(factors):
    """B C A in float64, where a core that is not there is the identity."""
    exact = {name: value.astype(np.float64) for name, value in factors.items()}
    return exact["B"] @ exact.get("C", np.eye(4)) @ exact["A"]


@pytest.mark.parametrize(("name", "exact"), [("ffa", True), ("fedsb", True), ("fedit", False)])
def test_the_product_of_what_is_merged_is_the_mean_product_where_one_factor_alone_moves(name, exact):
    method = methods.METHODS[name]
    shapes = {"A": (4, 32), "B": (48, 4), "C": (4, 4)}
    draw = np.random.default_rng(0)
    start = {factor: draw.normal(0, 1, shapes[factor]).astype(np.float32) for factor in method.factors}
    updates = [
        (
            {
                f: draw.normal(0, 1, shapes[f]).astype(np.float32)
                for f in start
                if method.factors[f].exchanged
            },
            samples,
        )
        for samples in (200, 31, 1)
    ]
    step = method.merges["layers"](lambda: (Contribution({}, one, samples) for one, samples in updates))
    after = products({f: start[f] + step.get(f, 0) for f in start})
    mean = sum(n * products({f: start[f] + one.get(f, 0) for f in start}) for one, n in updates) / 232
    assert bool(np.abs(after - mean).max() < 1e-4) is exact


# --- hetlora


def device(seed, rank, before, keys=tuple(SHAPES)):
    """A delta of a device of this rank."""
    draw = np.random.default_rng(seed)
    shapes = {key: (rank, 32) if key.endswith("A") else (48, rank) for key in keys}
    return Contribution(
        before, {key: draw.normal(0, 1, shape).astype(np.float32) for key, shape in shapes.items()}, 9
    )


def hetlora(made):
    return methods.METHODS["hetlora"].merges["layers"](lambda: iter(made))


def filled_up(made):
    """What the devices hold after the round, zeros where they hold nothing, and the norm of each one's product; float64."""
    held, norms = [], []
    for one in made:
        after = {}
        for key, step in one.delta.items():
            after[key] = np.zeros(one.before[key].shape)
            where = tuple(map(slice, step.shape))
            after[key][where] = one.before[key].astype(np.float64)[where] + step
        blocks = [after[f"{layer}.B"] @ after[f"{layer}.A"] for layer in {key[:-2] for key in after}]
        held.append(after)
        norms.append(np.sqrt(sum(np.sum(block**2) for block in blocks)))
    return held, norms


def dense_hetlora(made):  # devices of the full rank among them
    held, norms = filled_up(made)
    steps = {}
    for key in sorted({key for one in held for key in one}):
        holders = [(one[key], norm) for one, norm in zip(held, norms, strict=True) if key in one]
        mean = sum(norm * value for value, norm in holders) / sum(norm for _, norm in holders)
        steps[key] = mean - made[0].before[key]
    return steps


def test_hetlora_is_the_mean_of_what_is_filled_up_weighted_by_the_norm_of_the_product():
    before = delta(9)
    shallow = [key for key in SHAPES if key.startswith("layers.0.")]
    made = [device(0, 4, before), device(1, 2, before), device(2, 1, before, shallow)]
    seen, truth = hetlora(made), dense_hetlora(made)
    assert_same(seen, truth)
    equal = [one._replace(delta={**one.delta, "layers.0.q.B": 2 * one.delta["layers.0.q.B"]}) for one in made]
    with pytest.raises(AssertionError):  # the weights do depend on the products
        assert_same(hetlora(equal[:1] + made[1:]), truth)


def test_equal_devices_that_hold_all_are_followed():
    before, same = delta(9), device(0, 4, delta(9))
    assert_same(hetlora([same] * 3), dict(same.delta))
    alone = device(1, 2, before)
    step = hetlora([alone])["layers.0.q.A"]
    np.testing.assert_allclose(step[:2], alone.delta["layers.0.q.A"], atol=1e-6)
    assert not step[2:].any()  # what nobody holds stays
    both = hetlora([alone, device(2, 3, before)])["layers.0.q.A"]
    assert both[2].any() and not both[3].any()


def shares(made):
    """What each device counts in the mean of one A, where all start from zero."""
    held = np.stack([one.delta["layers.0.q.A"].ravel() for one in made], axis=1)
    return np.linalg.lstsq(held, hetlora(made)["layers.0.q.A"].ravel(), rcond=None)[0]


def test_a_device_counts_the_same_however_its_factors_share_its_product():
    """B G and G⁻¹ A are the same adapter."""
    before = ZEROS
    one, other = device(0, 4, before), device(1, 4, before)
    gauge = np.random.default_rng(3).normal(0, 1, (4, 4))
    turned = {
        key: (np.linalg.inv(gauge) @ value if key.endswith("A") else value @ gauge).astype(np.float32)
        for key, value in one.delta.items()
    }
    np.testing.assert_allclose(shares([one._replace(delta=turned), other]), shares([one, other]), rtol=1e-4)
    larger = one._replace(delta={key: 2 * value for key, value in one.delta.items()})
    assert shares([larger, other])[0] > 1.3 * shares([one, other])[0]


def test_devices_that_changed_nothing_leave_the_version_as_it_is():
    before = {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}
    nothing = Contribution(before, {key: np.zeros_like(value) for key, value in before.items()}, 3)
    assert hetlora([nothing, nothing]) == {}


def pruning(penalty=0.5, keep=0.5):
    return methods.build(settings.MethodChoice("hetlora", {"penalty": penalty, "keep": keep}), None, None)


def test_a_device_goes_on_with_fewer_ranks_where_what_lies_beyond_them_has_become_less():
    before = delta(1)
    tails = {key: (0.9 if key.endswith("A") else 1.05) * value for key, value in before.items()}
    assert pruning().next_rank(tails, before.__getitem__) == 2
    assert pruning().next_rank(before, tails.__getitem__) == 4
    assert pruning(keep=0.1).next_rank(tails, before.__getitem__) == 1
    leading = {key: value.copy() for key, value in before.items()}
    leading["layers.0.q.A"][:2] *= 0.1  # what is kept does not count
    assert pruning().next_rank(leading, before.__getitem__) == 4
    assert pruning(0.0).next_rank is None


def test_the_penalty_is_of_what_lies_beyond_and_its_gradient_is_finite_at_version_0():
    draw = torch.Generator().manual_seed(0)
    layers = [(torch.randn(4, 8, generator=draw), None, torch.randn(6, 4, generator=draw)) for _ in range(3)]
    seen = pruning().passes(1)[0].penalty(layers, [None] * 3)
    truth = sum(float(B[:, 2:].double().norm() * A[2:].double().norm()) for A, _, B in layers) / 3
    assert float(seen) == pytest.approx(0.5 * truth, rel=1e-6)
    for B in (torch.zeros(6, 4, requires_grad=True), layers[0][2].clone().requires_grad_()):
        A = layers[0][0].clone().requires_grad_()
        pruning().passes(1)[0].penalty([(A, None, B)], [None]).backward()
        assert torch.isfinite(A.grad).all() and torch.isfinite(B.grad).all()
        assert bool(A.grad[2:].any() and B.grad[:, 2:].any()) is bool(B.detach().any())
        assert not A.grad[:2].any() and not B.grad[:, :2].any()


# --- flexlora


def flexlora(made):
    return methods.METHODS["flexlora"].merges["layers"](lambda: iter(made))


def mean_products(made):
    """The dense mean of each layer's products over its holders, weighted by rows, in float64."""
    found = {}
    for layer in {key[:-2] for one in made for key in one.delta}:
        holders = [(one.after(), one.samples) for one in made if f"{layer}.A" in one.delta]
        dense = [(after[f"{layer}.B"].astype(np.float64) @ after[f"{layer}.A"], n) for after, n in holders]
        found[layer] = sum(n * product for product, n in dense) / sum(n for _, n in dense)
    return found


def product(step, before, layer, rank):
    B, A = (before[f"{layer}.{factor}"].astype(np.float64) + step[f"{layer}.{factor}"] for factor in "BA")
    return B[:, :rank] @ A[:rank]


@pytest.mark.parametrize(
    "ranks", [(4,), (4, 2, 2), (4, 4, 4, 2, 1)]
)  # of sums below, at and beyond a sketch's columns
def test_flexlora_has_the_best_factors_of_the_mean_product_in_every_rank(ranks):
    before = delta(9)
    shallow = [key for key in SHAPES if key.startswith("layers.0.")]
    made = [device(seed, rank, before)._replace(samples=50 + seed) for seed, rank in enumerate(ranks)]
    made.append(device(99, 1, before, shallow))
    step = flexlora(made)
    for layer, dense in mean_products(made).items():
        u, s, vt = np.linalg.svd(dense)
        for rank in (4, 2, 1):
            best = np.linalg.norm(dense - (u[:, :rank] * s[:rank]) @ vt[:rank])
            seen = np.linalg.norm(dense - product(step, before, layer, rank))
            assert best - 1e-4 <= seen <= 1.02 * best + 1e-4
            other = np.linalg.norm(
                dense - product({key: 0.9 * value for key, value in step.items()}, before, layer, rank)
            )
            assert other > 1.02 * best + 1e-4  # the comparison sees other factors
        rows = before[f"{layer}.A"] + step[f"{layer}.A"]
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)  # none is dead


def test_a_layer_narrower_than_the_rank_keeps_its_product_and_no_row_is_dead():
    draw = np.random.default_rng(0)
    before, made = (
        {
            f"layers.0.q.{f}": draw.normal(0, 1, s).astype(np.float32)
            for f, s in (("A", (4, 32)), ("B", (3, 4)))
        }
        for _ in "12"
    )
    one = Contribution(before, made, 5)
    step = flexlora([one])
    np.testing.assert_allclose(
        product(step, before, "layers.0.q", 4), mean_products([one])["layers.0.q"], atol=1e-4
    )
    assert np.linalg.norm(before["layers.0.q.A"] + step["layers.0.q.A"], axis=1).min() > 0.5
    assert np.array_equal(before["layers.0.q.B"][:, 3:] + step["layers.0.q.B"][:, 3:], np.zeros((3, 1)))


def test_equal_devices_keep_their_product_and_turning_one_inside_its_rank_changes_nothing():
    before, one = delta(9), device(0, 2, delta(9))
    alone, many = flexlora([one]), flexlora([one] * 3)
    gauge = np.random.default_rng(3).normal(0, 1, (2, 2))
    turned = {}
    for key, value in one.after().items():
        after = np.linalg.inv(gauge) @ value if key.endswith("A") else value @ gauge
        turned[key] = (after - before[key][tuple(map(slice, after.shape))]).astype(np.float32)
    for layer, dense in mean_products([one]).items():
        for step in (alone, many, flexlora([one._replace(delta=turned)])):
            np.testing.assert_allclose(product(step, before, layer, 4), dense, atol=1e-3)
            np.testing.assert_allclose(
                product(step, before, layer, 2), dense, atol=1e-3
            )  # all of it is in rank 2


# --- flora


def flora(made, kept):
    return methods.build(settings.MethodChoice("flora", {"kept": kept}), None, None).merges["layers"](
        lambda: iter(made)
    )


@pytest.mark.parametrize(("ranks", "kept"), [((4,), 8), ((4, 2, 1), 16), ((1,), 1), ((4, 4, 4), 5)])
def test_flora_adds_the_mean_product_to_what_it_keeps_exactly_while_there_is_room(ranks, kept):
    draw = np.random.default_rng(4)
    held = {f"layers.0.q.{f}": draw.normal(0, 1, s).astype(np.float32) for f, s in KEPT_SHAPES.items()}
    before = {**delta(9), **full(held, kept)}
    made = [device(seed, rank, before)._replace(samples=50 + seed) for seed, rank in enumerate(ranks)]
    step = flora(made, kept)
    assert {key.rpartition(".")[2] for key in step} == {"keptA", "keptB"}
    for layer, mean in mean_products(made).items():
        past = (before.get(f"{layer}.{f}", np.zeros(1)).astype(np.float64) for f in ("keptB", "keptA"))
        truth = mean + (np.matmul(*past) if f"{layer}.keptA" in before else 0)
        A, B = (before.get(f"{layer}.{f}", 0) + step[f"{layer}.{f}"] for f in ("keptA", "keptB"))
        assert len(A) == B.shape[1] == kept
        s = np.linalg.svd(truth, compute_uv=False)
        best = float(np.sqrt((s[kept:] ** 2).sum()))
        seen = np.linalg.norm(truth - B.astype(np.float64) @ A)
        assert best - 1e-3 <= seen <= 1.02 * best + 1e-3
        assert np.linalg.norm(truth - 0.9 * B.astype(np.float64) @ A) > 1.02 * best + 1e-3
        assert (best < 1e-3) is (kept >= sum(ranks) + (layer == "layers.0.q"))
        learned = min(kept, sum(ranks) + (layer == "layers.0.q"))
        assert A[:learned].any(1).all() and not A[learned:].any()  # nothing travels that says nothing


KEPT_SHAPES = {"keptA": (1, 32), "keptB": (48, 1)}


def full(held, kept):
    """What is kept of rank 1, in this rank."""
    filled = {}
    for key, value in held.items():
        shape = (kept, 32) if key.endswith("A") else (48, kept)
        filled[key] = np.zeros(shape, np.float32)
        filled[key][tuple(map(slice, value.shape))] = value
    return filled


def test_ranks_that_no_layer_can_multiply_are_refused():
    public = settings.Public("texts.jsonl", 3)
    for name, key, rank, more in (
        ("flora", "kept", 16, 256),
        ("flora", "kept", 200, 64),
        ("h2tune", "rank", 250, 16),
    ):
        choice = settings.MethodChoice(name, {key: more})
        fleet = settings.Fleet("f", (settings.Model("m"),), method=choice, public=public)
        fleet = msgspec.structs.replace(fleet, adapter=settings.Adapter(rank=rank))
        reason = f"rank is {rank} and \\[method\\] {name} adds {more}, but together .* 256 at most"
        with pytest.raises(InputError, match=reason):
            methods.of(fleet)


def test_flora_is_the_same_for_equal_devices_and_for_one_that_turns_inside_its_rank():
    before, one = delta(9), device(0, 2, delta(9))
    gauge = np.random.default_rng(3).normal(0, 1, (2, 2))
    turned = {}
    for key, value in one.after().items():
        after = np.linalg.inv(gauge) @ value if key.endswith("A") else value @ gauge
        turned[key] = (after - before[key][tuple(map(slice, after.shape))]).astype(np.float32)
    for made in ([one], [one] * 3, [one._replace(delta=turned)]):
        step = flora(made, 8)
        for layer, dense in mean_products([one]).items():
            np.testing.assert_allclose(step[f"{layer}.keptB"] @ step[f"{layer}.keptA"], dense, atol=1e-3)


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="there is no method `fedavg`; known: local, fedit"):
        methods.build(settings.MethodChoice("fedavg"), None, None)


@pytest.mark.parametrize("command", [("plan",), ("aggregator", "--state", "node")])
def test_ranks_that_a_method_cannot_merge_are_refused_before_anything_is_read_or_said(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where a node that went on would keep its state
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[fleet]\nname = "f"\nopen = true\n[adapter]\nrank = 8\nlower = [4]\n[[catalog]]\nsource = "nowhere"\n'
    )
    refused = CliRunner().invoke(cli.app, [*command, "--fleet", str(path)]).exception
    assert isinstance(refused, InputError)
    assert "lower is (4,), but has to be left out with fedit, which merges factors of one rank, 8" in str(
        refused
    )


def test_unequal_ranks_are_for_methods_that_can_merge_them_or_exchange_nothing():
    unequal = settings.Fleet("f", (settings.Model("m"),), adapter=settings.Adapter(rank=8, lower=(4,)))
    with pytest.raises(InputError, match="devices of unequal ranks need `local` or `hetlora` or `flexlora`"):
        methods.of(unequal)
    for name in ("local", "hetlora", "flexlora"):
        of = settings.Fleet("f", unequal.catalog, method=settings.MethodChoice(name), adapter=unequal.adapter)
        assert methods.of(of).name == name
    assert methods.of(settings.Fleet("f", unequal.catalog)).name == "fedit"


@pytest.mark.parametrize(
    ("rounds", "asked", "step"), [(3, None, 0.5), (4, None, 1.5), (3, 1.5, 1.5), (9, 0.1, 0.1)]
)
def test_a_fleet_of_few_rounds_has_a_finer_wire_unless_its_file_says(rounds, asked, step):
    fleet = settings.Fleet("f", (settings.Model("m"),), rounds=rounds, codec=settings.Codec(asked))
    assert methods.of(fleet).codec_step(fleet) == step
    flora = msgspec.structs.replace(fleet, method=settings.MethodChoice("flora"))
    assert methods.of(flora).codec_step(flora) == min(step, settings.FINE_STEP)


@pytest.mark.parametrize(
    ("tables", "least", "reason"),
    [
        ({"method": {"name": "h2tune"}}, 2, "the first makes the common frame"),
        ({"head": {"shared": "fleet"}}, 2, "the first makes the common frame"),
        ({"head": {}, "codistill": {}}, 2, "devices learn predictions in the round after them"),
        ({"head": {"shared": "fleet"}, "codistill": {}}, 3, "common frame, and devices learn predictions"),
        ({"head": {}}, 1, ""),
    ],
)
def test_rounds_of_which_nothing_could_come_are_refused(tables, least, reason):
    public = {"public": {"file": "public.jsonl", "texts": 40}} if reason else {}

    def read(rounds):
        fleet = {"fleet": {"name": "f", "rounds": rounds}, "catalog": [{"source": "m"}]}
        return methods.of(settings.parse({**fleet, **public, **tables}))

    assert read(least)
    if least > 1:
        with pytest.raises(InputError, match=rf"rounds is {least - 1}, but has to be {least} .*{reason}"):
            read(least - 1)


@pytest.mark.parametrize(
    ("frame", "tables", "reason"),
    [
        ("common", {}, r"\[public\] has texts that nothing in the fleet uses"),
        ("common", {"head": {}}, r"\[public\] has texts that nothing in the fleet uses"),
        ("common", {"head": {}, "codistill": {}}, None),
        ("rotated", {"head": {}, "codistill": {}}, 'frame is "rotated", but has to be left out'),
        (
            "rotated branches",
            {"head": {"shared": "fleet"}},
            'frame is "rotated branches", but has to be left',
        ),
        ("rotated", {"head": {"shared": "fleet"}}, None),
        ("rotated branches", {"method": {"name": "colora"}}, None),
    ],
)
def test_public_texts_and_a_frame_that_nothing_reads_are_refused(frame, tables, reason):
    public = {"file": "public.jsonl", "texts": 40, "frame": frame}
    fleet = settings.parse({"fleet": {"name": "f"}, "catalog": [{"source": "m"}], "public": public, **tables})
    if reason is None:
        assert methods.of(fleet)
    else:
        with pytest.raises(InputError, match=reason):
            methods.of(fleet)
