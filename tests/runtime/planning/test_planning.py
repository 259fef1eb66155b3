"""The plan a budget gets, and the predicted peak against that of the real trainer process."""

import os
import re

import msgspec
import pytest
from architectures import GEMMA, RATES, SMOLLM2, bare_plan
from edge_profiles import format_size

from edge_runtime.agent import measure
from edge_runtime.cli import views
from edge_runtime.demo import commands
from edge_runtime.errors import BudgetError, InputError
from edge_runtime.planning import search
from edge_runtime.planning.candidates import candidates, lower, predicted
from edge_runtime.planning.predict import Serving, Workload, predict
from edge_runtime.planning.search import choose
from edge_runtime.planning.time import Rates
from edge_runtime.settings import Adapter, Codistill, Fleet, Head, MethodChoice, Model, Public, Training
from edge_runtime.trainer.tokens import Tokenization

MIB = 1 << 20
RUNTIME = 300 * MIB
LARGE = msgspec.structs.replace(SMOLLM2, model_class="large@1")
SMALL = msgspec.structs.replace(LARGE, model_class="small@1", layers=6)
FACTS = {"large": LARGE, "small": SMALL}
CATALOG = (Model("large"), Model("large", depth=10), Model("small"))


def fleet(*catalog, rank=4, lower=(), **training):
    return Fleet(
        name="f",
        catalog=catalog or CATALOG,
        adapter=Adapter(rank=rank, lower=lower),
        training=Training(**{"rows_a_step": 8, "max_tokens": 64, **training}),
    )


def lowered(of, plan, facts=LARGE):
    return lower(Workload(of, facts, RUNTIME), plan)


@pytest.fixture(autouse=True)
def nothing_filled(monkeypatch):
    """A winner is one of the candidates: no block is kept in memory that is left over."""
    monkeypatch.setattr(search, "FULL", 0.0)


STEPS_DOWN = {"rank": 256, "lower": (64, 4), "shorter": (32, 8)}  # ranks whose factors weigh as much as a row


def plans(of):
    return [plan for group in candidates(of, FACTS, RUNTIME, RATES) for plan in group]


def test_model_comes_before_format_and_format_before_micro_batch():
    order = [(plan.source, plan.depth, plan.weights, plan.rows, plan.boundaries) for plan in plans(fleet())]
    models = [("large", 30), ("large", 10), ("small", 6)]
    ways = [*((rows, "input") for rows in (8, 4, 2, 1)), (1, "int8")]
    expected = [
        (*model, weights, *way) for model in models for weights in ("float32", "bfloat16") for way in ways
    ]
    assert order == expected


def test_within_a_format_length_comes_before_rank_and_rank_before_micro_batch():
    of = fleet(Model("small"), rows_a_step=2, **STEPS_DOWN)
    order = [(plan.weights, plan.tokens, plan.rank, plan.rows, plan.boundaries) for plan in plans(of)]
    ways = [(2, "input"), (1, "input"), (1, "int8")]
    assert order == [
        (weights, tokens, rank, *way)
        for weights in ("float32", "bfloat16")
        for tokens in (64, 32, 8)
        for rank in (256, 64, 4)
        for way in ways
    ]


def test_a_plan_is_predicted_with_its_own_rank_and_length():
    stepping = plans(fleet(Model("small", weights=("float32",)), **STEPS_DOWN))
    for rank, tokens in [(256, 64), (4, 64), (256, 8)]:
        alone = plans(fleet(Model("small", weights=("float32",)), rank=rank, max_tokens=tokens))
        assert [plan for plan in stepping if (plan.rank, plan.tokens) == (rank, tokens)] == alone


@pytest.mark.parametrize("of", [fleet(), fleet(**STEPS_DOWN)])
def test_each_budget_gets_the_first_plan_in_that_order_that_fits(of):
    ordered = plans(of)
    smallest = [
        min(group, key=lambda plan: plan.predicted_peak_bytes)
        for group in candidates(of, FACTS, RUNTIME, RATES)
    ]
    for wanted in ordered:
        budget = wanted.predicted_peak_bytes
        first = next(plan for plan in ordered if plan.predicted_peak_bytes <= budget)
        chosen = choose(of, FACTS, budget, RUNTIME, RATES)
        assert chosen.fits == first
        assert chosen.rejected == smallest[: len(chosen.rejected)]
        assert all(plan.predicted_peak_bytes > budget for plan in chosen.rejected)
    assert choose(of, FACTS, 1 << 40, RUNTIME, RATES) == (ordered[0], [], None, "")


def test_a_budget_decides_what_is_given_up_first():
    """Micro-batch, then rank, then length, then format, then model: each only where what comes before is not enough."""
    of = fleet(**STEPS_DOWN)
    seen = [choose(of, FACTS, plan.predicted_peak_bytes, RUNTIME, RATES).fits for plan in plans(of)]
    kinds = {(plan.source, plan.depth, plan.weights, plan.tokens, plan.rank) for plan in seen}
    assert {("large", 30, "float32", 64, rank) for rank in (256, 64, 4)} <= kinds
    assert ("large", 30, "float32", 8, 4) in kinds
    assert ("small", 6, "bfloat16", 8, 4) in kinds


def test_the_next_better_plan_of_the_winners_model_is_told():
    of = fleet(Model("large", weights=("float32",)), Model("small"), **STEPS_DOWN)
    ordered = plans(of)
    of_which = set()
    for wanted in ordered:
        chosen = choose(of, FACTS, wanted.predicted_peak_bytes, RUNTIME, RATES)
        at = ordered.index(chosen.fits)
        first = at == 0 or ordered[at - 1].source != chosen.fits.source
        assert chosen.better == (None if first else ordered[at - 1])
        assert first or chosen.better.predicted_peak_bytes > wanted.predicted_peak_bytes
        of_which.add((chosen.fits.source, first))
    assert of_which == {(source, first) for source in ("large", "small") for first in (True, False)}


def test_what_is_shown_names_length_and_rank_of_what_was_too_large(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    of = fleet(Model("small"), rank=256, lower=(4,), shorter=(8,), rows_a_step=2)
    groups = list(candidates(of, FACTS, RUNTIME, RATES))
    best = next(plan for plan in groups[1] if plan.rank == 4)
    chosen = choose(of, FACTS, best.predicted_peak_bytes, RUNTIME, RATES)
    assert chosen.fits == best and chosen.better == groups[1][2]
    views.show_plan(chosen, best.predicted_peak_bytes, None)
    shown = capsys.readouterr().out
    assert "small, 6 of 6 layers, bfloat16, rank 4, micro-batches of 2 x 64 tokens: " in shown
    table = shown[shown.index("preferred, but too large") :].splitlines()
    (smallest,) = [line for line in table if "float32" in line]
    (better,) = [line for line in table if "bfloat16" in line]
    assert "rank 4, micro-batches of 1 x 8 tokens, boundaries in 8 bits" in smallest
    assert "rank 256, micro-batches of 1 x 64 tokens, boundaries in 8 bits" in better
    values = views.plan_values(chosen, best.predicted_peak_bytes, None)
    assert [(one["tokens"], one["rank"]) for one in values["rejected"]] == [(8, 4)]
    over = groups[1][2].predicted_peak_bytes - best.predicted_peak_bytes
    assert (values["better"]["rank"], values["better"]["over_budget_bytes"]) == (256, over)
    assert views.plan_values(choose(of, FACTS, 1 << 40, RUNTIME, RATES), 1 << 40, None)["better"] is None


def test_one_byte_less_gets_the_next_plan():
    of = fleet(Model("large", weights=("float32",)))
    first, second = plans(of)[:2]
    assert choose(of, FACTS, first.predicted_peak_bytes, RUNTIME, RATES).fits == first
    assert choose(of, FACTS, first.predicted_peak_bytes - 1, RUNTIME, RATES).fits == second


def test_a_budget_that_is_too_small_is_told_the_smallest_that_is_not():
    of = fleet(**STEPS_DOWN)
    least = min(plans(of), key=lambda plan: plan.predicted_peak_bytes)
    with pytest.raises(BudgetError) as refused:
        choose(of, FACTS, least.predicted_peak_bytes - 1, RUNTIME, RATES)
    said = str(refused.value)
    assert "small with 6 layers in bfloat16, rank 4 and 8 tokens, which needs" in said
    assert choose(of, FACTS, least.predicted_peak_bytes, RUNTIME, RATES).fits == least


# --- a deadline for a step


def in_time(of, longest):
    """The same fleet, with the seconds of a plan as its deadline."""
    training = msgspec.structs.replace(of.training, step_deadline_s=longest.step_seconds)
    return msgspec.structs.replace(of, training=training)


@pytest.mark.parametrize(
    "of", [fleet(), fleet(Model("large", weights=("bfloat16", "q4_1")), *CATALOG, **STEPS_DOWN)]
)
def test_each_deadline_gets_the_first_plan_that_fits_and_is_in_time(of):
    ordered = plans(of)
    budgets = sorted(plan.predicted_peak_bytes for plan in ordered)[:: len(ordered) // 4 - 1]
    winners = set()
    for budget in budgets:
        small = [plan for plan in ordered if plan.predicted_peak_bytes <= budget]
        for longest in small[:: 1 + len(small) // 12]:
            chosen = choose(in_time(of, longest), FACTS, budget, RUNTIME, RATES)
            assert chosen.fits == next(plan for plan in small if plan.step_seconds <= longest.step_seconds)
            winners.add((chosen.fits.source, chosen.fits.depth, chosen.fits.weights))
    assert len(winners) > 3


def test_a_deadline_picks_a_smaller_model_or_another_format():
    of = fleet(Model("large", weights=("float32", "bfloat16")), Model("small"))
    large, bfloat16, small = (group[0] for group in list(candidates(of, FACTS, RUNTIME, RATES))[:3])
    assert choose(of, FACTS, 1 << 40, RUNTIME, RATES).fits == large
    assert choose(in_time(of, bfloat16), FACTS, 1 << 40, RUNTIME, RATES).fits == bfloat16
    slower = Rates(*(rate / 2 for rate in msgspec.structs.astuple(RATES)))
    chosen = choose(in_time(of, bfloat16), FACTS, 1 << 40, RUNTIME, slower).fits
    assert chosen.source == small.source and chosen.step_seconds <= bfloat16.step_seconds


def test_what_was_too_slow_is_told_by_seconds_and_what_was_too_large_by_bytes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    of = fleet(Model("large", weights=("float32", "bfloat16")), Model("small", weights=("bfloat16",)))
    first, second, small = candidates(of, FACTS, RUNTIME, RATES)
    budget = max(plan.predicted_peak_bytes for plan in second)
    limited = in_time(of, small[0])
    deadline = limited.training.step_deadline_s
    chosen = choose(limited, FACTS, budget, RUNTIME, RATES)
    fastest = min(second, key=lambda plan: plan.step_seconds)
    assert chosen.fits == small[0]
    assert chosen.rejected == [min(first, key=lambda plan: plan.predicted_peak_bytes), fastest]
    large, slow = views.plan_values(chosen, budget, deadline)["rejected"]
    assert large["over_budget_bytes"] == chosen.rejected[0].predicted_peak_bytes - budget > 0
    assert slow["over_budget_bytes"] == 0
    assert slow["over_deadline_s"] == fastest.step_seconds - deadline > 0
    views.show_plan(chosen, budget, deadline)
    shown = capsys.readouterr().out
    assert f"about {small[0].step_seconds:.3g} s of {deadline:g} s a step on this machine" in shown
    table = shown[shown.index("preferred, but too large or too slow") :].splitlines()
    (line,) = [line for line in table if "large, 30 layers, bfloat16" in line]
    assert line.rstrip(" │").endswith(f" {slow['over_deadline_s']:.3g} s") and " and " not in line
    (line,) = [line for line in table if "large, 30 layers, float32" in line]
    assert f"MiB and {large['over_deadline_s']:.3g} s" in line
    views.show_plan(choose(of, FACTS, budget, RUNTIME, RATES), budget, None)
    shown = capsys.readouterr().out
    assert "s a step on this machine" in shown and "too slow" not in shown


def test_where_no_step_is_in_time_the_fastest_is_told():
    of = fleet(**STEPS_DOWN)
    fastest = min(plans(of), key=lambda plan: plan.step_seconds)
    limited = in_time(of, msgspec.structs.replace(fastest, step_seconds=0.99 * fastest.step_seconds))
    name = (
        f"{fastest.source} with {fastest.depth} layers in {fastest.weights}, rank {fastest.rank} and 8 tokens"
    )
    with pytest.raises(BudgetError) as refused:
        choose(limited, FACTS, 1 << 40, RUNTIME, RATES)
    within = f"no model of the catalog makes a step within {limited.training.step_deadline_s:g} s"
    takes = f"; the fastest would be {name}, which takes {fastest.step_seconds:.3g} s"
    then = "; raise [training] step_deadline_s, or add a smaller model"
    assert str(refused.value) == f"{within} in a budget of 1 TiB{takes}{then}"
    with pytest.raises(BudgetError) as refused:
        choose(limited, FACTS, 1, RUNTIME, RATES)
    assert str(refused.value) == within + takes + then
    assert choose(in_time(of, fastest), FACTS, 1 << 40, RUNTIME, RATES).fits == fastest


def test_a_budget_that_is_too_small_is_told_the_smallest_that_is_in_time_as_well():
    of = fleet(Model("large", weights=("float32", "q4_1")))
    ordered = plans(of)
    quick = min(ordered, key=lambda plan: plan.step_seconds)
    least = min(ordered, key=lambda plan: plan.predicted_peak_bytes)
    assert least.step_seconds > quick.step_seconds
    with pytest.raises(BudgetError) as refused:
        choose(in_time(of, quick), FACTS, least.predicted_peak_bytes - 1, RUNTIME, RATES)
    assert "the smallest that would fit and makes a step within" in str(refused.value)
    assert f"which needs {format_size(quick.predicted_peak_bytes)}; raise --budget" in str(refused.value)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_micro_batch_goes_from_a_whole_step_to_a_single_row(rows):
    seen = [plan.rows for plan in plans(fleet(Model("small", weights=("float32",)), rows_a_step=rows))]
    assert (
        seen == {1: [1, 1], 3: [3, 2, 1, 1], 16: [16, 8, 4, 2, 1, 1]}[rows]
    )  # the last with 8-bit boundaries


def test_small_tiles_of_the_mlp_come_last_and_where_rows_are_longer_than_they_are():
    of = fleet(Model("small", weights=("q4_1",)), rows_a_step=1, max_tokens=512, shorter=(256,))
    ways = [(plan.tokens, plan.boundaries, plan.mlp_tokens, plan.streamed) for plan in plans(of)]
    assert ways == [
        *((512, kept, tile, False) for kept, tile in [("input", 1024), ("int8", 1024), ("int8", 256)]),
        (512, "int8", None, True),
        *((256, kept, 1024, False) for kept in ("input", "int8")),
        (256, "int8", None, True),
    ]


def test_an_mlp_without_a_gate_is_not_predicted_in_tiles():
    longer = fleet(Model("small", weights=("bfloat16",)), rows_a_step=4, max_tokens=2048)
    tiled, whole = (
        next(candidates(longer, {"small": msgspec.structs.replace(SMALL, family=family)}, RUNTIME, RATES))[0]
        for family in ("llama", "phi")
    )
    assert tiled.terms["block"] < whole.terms["block"]
    assert "MLPs in tiles of 1024" in tiled.how


def test_memory_that_is_left_over_keeps_as_many_blocks_as_fit(monkeypatch):
    monkeypatch.setattr(search, "FULL", 0.95)
    of = fleet(Model("large", weights=("bfloat16",)), rows_a_step=4, max_tokens=512)
    best = plans(of)[0]
    tight = choose(of, FACTS, best.predicted_peak_bytes, RUNTIME, RATES).fits
    assert tight == best and tight.kept_blocks == 0
    before = best
    for budget in (best.predicted_peak_bytes * times // 10 for times in (12, 14, 16)):
        fits = choose(of, FACTS, budget, RUNTIME, RATES).fits
        assert before.kept_blocks < fits.kept_blocks < 30
        assert fits.step_seconds < before.step_seconds
        assert before.predicted_peak_bytes < fits.predicted_peak_bytes <= 0.95 * budget
        one_more = msgspec.structs.replace(fits, kept_blocks=fits.kept_blocks + 1)
        assert sum(terms_of(of, one_more).values()) > 0.95 * budget
        before = fits
    assert before.how.endswith(f", {before.kept_blocks} blocks run once")
    assert choose(of, FACTS, 1 << 40, RUNTIME, RATES).fits.kept_blocks == 30
    _, *ways = lowered(of, before)
    assert [(way.rows, way.kept_blocks) for way in ways[:2]] == [
        (4, 0),
        (2, 0),
    ]  # first what costs time alone


def terms_of(of, plan):
    return predict(Workload(of, LARGE, RUNTIME), plan, lengths=plan.tokens // 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kept_blocks": 31}, "31 blocks are to run once, but large has 30"),
        ({"streamed": True, "kept_blocks": 1}, "weights are streamed cannot run once"),
    ],
)
def test_blocks_that_cannot_be_kept_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        bare = bare_plan(LARGE, 30, "q4_1", source="large", **fields)
        predicted(Workload(fleet(), LARGE, RUNTIME), RATES, bare)


def test_a_plan_that_is_in_time_only_with_kept_blocks_is_chosen(monkeypatch):
    monkeypatch.setattr(search, "FULL", 0.95)
    of = fleet(Model("large", weights=("bfloat16",)), rows_a_step=4, max_tokens=128)
    slow, fast = plans(of)[0], choose(of, FACTS, 1 << 40, RUNTIME, RATES).fits
    assert fast.step_seconds < 0.8 * slow.step_seconds
    limited = in_time(
        of, msgspec.structs.replace(slow, step_seconds=(slow.step_seconds + fast.step_seconds) / 2)
    )
    assert choose(limited, FACTS, 1 << 40, RUNTIME, RATES).fits == fast
    with pytest.raises(BudgetError, match="no model of the catalog makes a step within"):
        choose(limited, FACTS, 1 << 40, RUNTIME, RATES, fill=False)


def test_a_running_plan_with_kept_blocks_first_runs_them_again_and_never_takes_more_rows():
    of = fleet(Model("large", weights=("bfloat16",)), rows_a_step=4, max_tokens=128)
    bare = bare_plan(LARGE, 30, "bfloat16", tokens=128, rows=4, kept_blocks=20)
    kept = predicted(Workload(of, LARGE, RUNTIME), RATES, bare)
    _, *ways = lowered(
        msgspec.structs.replace(of, public=Public("public.jsonl"), codistill=Codistill(rows=16)), kept
    )
    assert [(way.rows, way.kept_blocks) for way in ways][:2] == [(4, 0), (3, 0)]


TRAINING = ("boundaries", "block")


def test_keys_and_values_of_answers_are_predicted_where_they_weigh_more_than_training():
    of = fleet(Model("large", weights=("q4_1",)), rows_a_step=1, max_tokens=2048)
    answering = msgspec.structs.replace(of, public=Public("public.jsonl"), codistill=Codistill())
    for kv_heads, larger in ((LARGE.kv_heads, False), (LARGE.heads, True)):
        known = {"large": msgspec.structs.replace(LARGE, kv_heads=kv_heads)}
        for plain, answers in zip(
            *(next(candidates(one, known, RUNTIME, RATES)) for one in (of, answering)), strict=True
        ):
            assert ("answers" in answers.terms) == larger
            if "answers" in answers.terms:
                cache = 2 * 2048 * 30 * kv_heads * LARGE.head_dim * 2
                assert answers.terms["answers"] == cache + plain.terms["block"] // 2
            else:
                assert [answers.terms[name] for name in TRAINING] == [plain.terms[name] for name in TRAINING]


@pytest.mark.parametrize(("texts", "larger"), [(1_000, False), (100_000, True)])
def test_head_inputs_of_many_public_texts_are_predicted_where_they_weigh_more_than_training(texts, larger):
    of = fleet(Model("large", weights=("q4_1",)), rows_a_step=1, max_tokens=512)
    headed = msgspec.structs.replace(of, public=Public("public.jsonl", texts), head=Head())
    plain, found = (next(candidates(each, FACTS, RUNTIME, RATES))[0] for each in (of, headed))
    assert ("inputs" in found.terms) == larger
    if larger:
        numbers = (texts + 512 + LARGE.hidden) * LARGE.hidden
        assert found.terms["inputs"] == 2 * 4 * numbers + plain.terms["block"] // 2
    assert found.predicted_peak_bytes > plain.predicted_peak_bytes or not larger


@pytest.mark.parametrize(("texts", "larger"), [(600, False), (60_000, True)])
def test_a_frame_of_many_public_texts_is_predicted_where_it_weighs_more_than_training(texts, larger):
    of = fleet(Model("large", weights=("q4_1",)), rows_a_step=8, max_tokens=512)
    public = Public("public.jsonl", texts)
    framed = msgspec.structs.replace(of, public=public, method=MethodChoice("heterotune", {"rank": 8}))
    plan = next(candidates(framed, FACTS, RUNTIME, RATES))[0]
    assert ("frame" in plan.terms) == larger
    if larger:  # at least the activations of the widest layer, and centred, beside Z
        assert plan.terms["frame"] > 4 * texts * (2 * LARGE.intermediate + 256)


def test_a_mixtures_hidden_units_and_all_maps_are_predicted():
    of = fleet(Model("large", weights=("q4_1",)), rows_a_step=8, max_tokens=512)
    peaks = {}
    for width in (0, 16, 64):
        values = {"form": "mixture", "width": width} if width else {}
        choice = MethodChoice("heterotune", values)
        framed = msgspec.structs.replace(of, public=Public("public.jsonl", 60), method=choice)
        plan = next(candidates(framed, FACTS, RUNTIME, RATES))[0]
        peaks[width] = plan.terms["block"]
        # F and G of each layer, frozen, beside A and B
        frozen = 4 * 16 * sum(map(sum, LARGE.linears.values())) * 30
        assert plan.terms["adapter"] > frozen
    # 7 layers of a block keep 4 branches' hidden units of each token, four times, with their gradients
    assert peaks[64] - peaks[16] == 2 * 4 * (8 * 512) * 7 * 4 * 4 * (64 - 16)


def test_a_gate_has_no_tiles_and_two_branches_are_predicted():
    of = fleet(Model("large", weights=("bfloat16",)), rows_a_step=8, max_tokens=1024)
    public = Public("public.jsonl", 60)
    peaks = {}
    for gate, tiles in (("trained", {None}), ("closed", {1024, 256})):
        for rank in (8, 16):
            choice = MethodChoice("colora", {"gate": gate, "rank": rank})
            gated = msgspec.structs.replace(of, public=public, method=choice)
            group = next(candidates(gated, FACTS, RUNTIME, RATES))
            assert {plan.mlp_tokens for plan in group} == tiles
            assert {plan.mlp_tokens for plan in lowered(gated, group[0])} == tiles
            peaks[gate, rank] = group[0].terms["block"]
    assert peaks["trained", 16] > peaks["closed", 16] + 8 * 1024 * LARGE.intermediate  # without tiles
    assert peaks["trained", 16] - peaks["trained", 8] == 2 * 4 * (8 * 1024) * 7 * 5 * 8


def test_a_second_pass_over_text_keeps_what_the_first_predicted():
    """The released comparison of two passes comes in the third round; of labels it takes next to nothing."""
    of = fleet(Model("large", weights=("bfloat16",)), rank=16, rows_a_step=8, max_tokens=512)
    of = msgspec.structs.replace(
        of, public=Public("public.jsonl", 60), method=MethodChoice("h2tune", {"rank": 8})
    )
    terms = {
        (rounds, head): next(
            candidates(msgspec.structs.replace(of, rounds=rounds, head=head), FACTS, RUNTIME, RATES)
        )[0].terms
        for rounds in (2, 3)
        for head in (None, Head())
    }
    assert terms[2, Head()] == terms[3, Head()]
    before, after = terms[2, None], terms[3, None]
    assert after.pop("references") == 2 * 8 * 512 * LARGE.hidden
    assert after["kernels"] == before["kernels"] + 20 * MIB
    assert {**after, "kernels": 0} == {**before, "kernels": 0}


def test_all_copies_of_an_adapter_are_predicted_where_they_weigh_more_than_a_short_row():
    """As a round starts: the adapter, the whole state, and what the version has of it; private factors as a file, too."""
    of = fleet(Model("large", weights=("bfloat16",)), rank=64, rows_a_step=1, max_tokens=8)
    values = 30 * 64 * sum(map(sum, LARGE.linears.values()))
    for method, copies in (("fedit", 2), ("local", 3)):
        terms = plans(msgspec.structs.replace(of, method=MethodChoice(method)))[0].terms
        assert terms["adapter"] == 6 * values
        # there is no optimiser yet, and no kernel
        assert terms["state"] + terms["kernels"] == (4 * copies - 2) * values
    longer = msgspec.structs.replace(of, training=Training(rows_a_step=16, max_tokens=512))
    assert "state" not in plans(longer)[0].terms


def test_a_running_trainer_is_past_its_maps_into_the_frame():
    of = fleet(Model("large", weights=("q4_1",)), rows_a_step=8, max_tokens=512)
    public = Public("public.jsonl", 60_000)
    framed = msgspec.structs.replace(of, public=public, method=MethodChoice("heterotune", {"rank": 8}))
    plan = next(candidates(framed, FACTS, RUNTIME, RATES))[0]
    now, *ways = lowered(framed, plan)
    assert "frame" in plan.terms and "frame" not in now.terms
    assert [way.rows for way in ways[:3]] == [4, 2, 1]


def test_a_running_plan_is_lowered_in_the_order_that_costs_least():
    of = fleet(Model("large", weights=("bfloat16",)), rank=16, rows_a_step=8, max_tokens=1024)
    first = plans(of)[0]
    now, *ways = lowered(of, first)
    assert now == first
    assert [(way.rows, way.boundaries, way.mlp_tokens) for way in ways] == [
        *((rows, "input", 1024) for rows in (4, 2, 1)),
        (1, "int8", 1024),
        (1, "int8", 256),
    ]
    sizes = [way.predicted_peak_bytes for way in (first, *ways)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    same = {
        name: getattr(first, name) for name in ("source", "depth", "weights", "rank", "tokens", "streamed")
    }
    assert all({name: getattr(way, name) for name in same} == same for way in ways)
    assert lowered(of, ways[-1])[1:] == []
    streamed = plans(fleet(Model("large", weights=("q4_1",)), rows_a_step=8, max_tokens=512))[-1]
    assert streamed.streamed and lowered(of, streamed)[1:] == []


def test_smaller_micro_batches_that_would_need_more_for_their_sums_are_no_way_down():
    of = fleet(Model("large", weights=("bfloat16",)), rank=256, rows_a_step=8, max_tokens=8)
    first = plans(of)[0]
    assert all(way.predicted_peak_bytes < first.predicted_peak_bytes for way in lowered(of, first)[1:])
    assert plans(of)[1].predicted_peak_bytes > first.predicted_peak_bytes


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (fleet(Model("small", depth=7)), "the catalog wants 7 layers of small, which has 6"),
        (fleet(Model("small", depth=0)), "the catalog wants 0 layers of small, which has 6"),
        (fleet(Model("small"), max_tokens=2049), "max_tokens is 2049, but small has 2048 positions"),
    ],
)
def test_what_a_model_has_not_is_refused(of, message):
    with pytest.raises(InputError, match=message):
        choose(of, FACTS, 1 << 40, RUNTIME, RATES)


def test_lengths_above_a_models_positions_are_left_out_for_it_alone():
    short = msgspec.structs.replace(SMALL, model_class="short@1", positions=40)
    of = fleet(Model("large"), Model("short"), shorter=(40, 8))
    lengths = {
        group[0].source: list(dict.fromkeys(plan.tokens for plan in group))
        for group in candidates(of, {**FACTS, "short": short}, RUNTIME, RATES)
    }
    assert lengths == {"large": [64, 40, 8], "short": [40, 8]}
    too_short = msgspec.structs.replace(short, positions=7)
    with pytest.raises(InputError, match="shorter goes down to 8, but short has 7 positions"):
        list(candidates(of, {**FACTS, "short": too_short}, RUNTIME, RATES))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (fleet(Model("large", depth=10)), fleet(Model("large", depth=11))),
        (fleet(Model("large", weights=("bfloat16",))), fleet(Model("large", weights=("float32",)))),
        (fleet(rank=4), fleet(rank=16)),
        (fleet(rows_a_step=4), fleet(rows_a_step=5)),
        (fleet(max_tokens=64), fleet(max_tokens=65)),
    ],
)
def test_more_of_anything_is_predicted_to_need_more(less, more):
    assert plans(less)[0].predicted_peak_bytes < plans(more)[0].predicted_peak_bytes


def test_the_prediction_is_the_sum_of_its_terms_and_knows_the_weights():
    plan = plans(fleet(Model("large", depth=10, weights=("bfloat16",))))[0]
    assert plan.predicted_peak_bytes == sum(plan.terms.values())
    assert plan.terms["runtime"] == RUNTIME
    assert plan.terms["weights"] == 2 * (10 * 3_538_944 + 49152 * 576)


# --- against the process that is predicted


@pytest.fixture
def clean_environment(cache, monkeypatch):
    """What a shell has, so that nothing set for the tests changes the trainer's memory."""
    for name in set(os.environ) - {"PATH", "HOME", "TMPDIR", "LANG", "EDGE_RUNTIME_CACHE"}:
        monkeypatch.delenv(name)
    # the threads of a trainer beside other tests wait asleep: torch's spin, which takes no memory and all cores
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def assert_close(predicted, measured):
    """At most 15 % over, so that little memory lies idle, and at most 3 % under, so that budgets hold."""
    assert 0.97 <= predicted / measured <= 1.15, (
        f"predicted {predicted / MIB:.0f} MiB, measured {measured / MIB:.0f}"
    )


@pytest.mark.parametrize(
    ("depth", "weights", "rows", "kept_blocks"),
    [(10, "bfloat16", 8, 0), (4, "float32", 2, 0), (10, "q4_1", 8, 0), (10, "q4_1", 8, 10)],
)
def test_the_prediction_is_near_the_trainers_peak(
    demo_facts,
    demo_tokenizer,
    clean_environment,
    tmp_path,
    record_property,
    depth,
    weights,
    rows,
    kept_blocks,
):
    drawn = commands.rows("kitchen", train=60, held_out=8, seed=0)
    how = Tokenization(demo_tokenizer, demo_facts.vocabulary, 512)
    longest = max(len(one.ids) for one in how.examples([*drawn.train, *drawn.held_out]))
    of, plan = measure.planned(
        demo_facts, depth, measure.Trial(weights, 16, rows, longest, steps=2, kept_blocks=kept_blocks)
    )
    measured = measure.train(demo_facts, of, plan, drawn.train, drawn.held_out, tmp_path).measured_peak_bytes
    record_property("predicted / measured", round(plan.predicted_peak_bytes / measured, 3))
    assert_close(plan.predicted_peak_bytes, measured)
    with pytest.raises(AssertionError, match="predicted"):
        assert_close(plan.predicted_peak_bytes - plan.terms["weights"], measured)


def test_what_a_method_freezes_or_keeps_takes_less():
    def predicted(method):
        of = fleet(Model("large", weights=("bfloat16",)), rank=64)
        return plans(msgspec.structs.replace(of, method=MethodChoice(method)))[-1].terms["adapter"]

    values = predicted("local") / 10  # both factors are trained, and summed over micro-batches
    assert predicted("fedit") == predicted("fedsa") == 10 * values
    assert 4 * values < predicted("fedsb") < 4.5 * values  # both are frozen, and a core is small
    assert predicted("fedsb") < predicted("ffa") < predicted("fedit")


def test_a_large_tokenizer_takes_more_than_a_small_packed_model():
    def planned(megabytes, tokens=16):
        known = msgspec.structs.replace(GEMMA, tokenizer_bytes=megabytes * MIB)
        return predicted(Workload(fleet(), known, RUNTIME), RATES, bare_plan(known, 2, "q4_1", tokens=tokens))

    assert planned(3) == planned(0)
    read = planned(32)
    assert read.terms.keys() == {"runtime", "kernels", "adapter", "tokenizer"}
    assert read.predicted_peak_bytes == RUNTIME + (11 * 32 - 36) * MIB
    assert planned(32, tokens=128).predicted_peak_bytes == read.predicted_peak_bytes
    assert "weights" in planned(24).terms


def test_a_running_trainer_is_without_its_tokenizer():
    of = fleet(Model("large", weights=("q4_1",)), rows_a_step=4, max_tokens=128)
    large = msgspec.structs.replace(GEMMA, tokenizer_bytes=48 * MIB)
    (bare, *_), (first, *_) = (
        next(iter(candidates(of, {"large": known}, RUNTIME, RATES))) for known in (GEMMA, large)
    )
    assert "tokenizer" in first.terms and first.predicted_peak_bytes > bare.predicted_peak_bytes
    ways = lowered(of, first, large)
    assert ways[0].terms == bare.terms and len(ways) > 1
    assert ways == lowered(of, bare, GEMMA)


def test_a_server_beside_the_trainer_has_its_part_of_the_budget():
    of = fleet()
    alone, serving = choose(of, FACTS, 1 << 40, RUNTIME, RATES).fits, Serving(context=1024, parallel=2)
    beside = choose(of, FACTS, 1 << 40, RUNTIME, RATES, serving=serving).fits
    assert msgspec.structs.replace(beside, serving_bytes=0, server=None) == alone
    assert (alone.serving_bytes, beside.server) == (0, "torch")
    # the runtime and the weights at least, and what keys and values add
    assert beside.serving_bytes > RUNTIME + beside.terms["weights"]
    longer = choose(of, FACTS, 1 << 40, RUNTIME, RATES, serving=serving._replace(context=2048)).fits
    token = 2 * LARGE.kv_heads * LARGE.head_dim * 4 * 30
    assert longer.serving_bytes - beside.serving_bytes == pytest.approx(1.3 * 2 * 1024 * token, rel=1e-6)
    # what holds the trainer alone is too small for both, by the smallest model's figures
    least = min(
        (plan for group in candidates(of, FACTS, RUNTIME, RATES, serving) for plan in group),
        key=lambda plan: plan.needed_bytes,
    )
    assert choose(of, FACTS, least.needed_bytes, RUNTIME, RATES, serving=serving).fits == least
    assert choose(of, FACTS, least.needed_bytes - 1, RUNTIME, RATES).fits.serving_bytes == 0
    figures = (least.needed_bytes, least.predicted_peak_bytes, least.serving_bytes)
    needs = "which needs {}: {} to train and {} to serve".format(*map(format_size, figures))
    with pytest.raises(BudgetError, match=re.escape(needs)):
        choose(of, FACTS, least.needed_bytes - 1, RUNTIME, RATES, serving=serving)


ONNX = Serving(context=1024, parallel=2, onnx_bytes=90 * MIB)


def test_onnx_runtime_serves_where_it_can_and_fits():
    """Of each plan the one that it serves comes first, then the same with torch."""
    of = fleet(Model("large", weights=("q4_1",)))
    first = choose(of, FACTS, 1 << 40, RUNTIME, RATES, serving=ONNX)
    assert first.fits.server == "onnx" and first.server.startswith("ONNX Runtime serves")
    assert first.fits.summary.endswith(", served by ONNX Runtime")
    # float32 weights are the same in both, but torch itself is larger; bfloat16 is float32 in a graph
    needed = {
        (plan.weights, plan.server): plan.serving_bytes
        for group in candidates(fleet(Model("large")), FACTS, RUNTIME, RATES, ONNX)
        for plan in group
    }
    assert needed["float32", "onnx"] < needed["float32", "torch"]
    assert needed["bfloat16", "onnx"] == needed["float32", "onnx"] > needed["bfloat16", "torch"]
    of = fleet(Model("large", weights=("bfloat16",)))
    least = min(
        (plan for group in candidates(of, FACTS, RUNTIME, RATES, ONNX) for plan in group),
        key=lambda plan: plan.needed_bytes,
    )
    small = choose(of, FACTS, least.needed_bytes, RUNTIME, RATES, serving=ONNX)
    assert small.fits.server == "torch" and small.better.server == "onnx"
    assert re.fullmatch(r"torch serves: ONNX Runtime would need [\d.]+ [MG]iB to serve", small.server)


@pytest.mark.parametrize(
    ("weights", "serving", "reason"),
    [
        ("nf4", ONNX, "ONNX Runtime has no fast operator for nf4"),
        ("q4_1", ONNX._replace(unserved={LARGE.model_class: "no such heads"}), "no such heads"),
        ("q4_1", ONNX._replace(onnx_bytes=0, unserved={LARGE.model_class: "not installed"}), "not installed"),
    ],
)
def test_torch_serves_with_the_reason(weights, serving, reason):
    choice = choose(
        fleet(Model("large", weights=(weights,))), FACTS, 1 << 40, RUNTIME, RATES, serving=serving
    )
    assert (choice.fits.server, choice.server) == ("torch", f"torch serves: {reason}")
