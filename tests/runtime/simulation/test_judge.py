"""What the results of a study say: kept row by row, compared, and shown."""

import msgspec
import numpy as np
import pytest
from results import flagged, outcome

from edge_runtime.simulation import judge, pictures, plan, report, results, spec

ARMS = (
    spec.Arm("local"),
    spec.Arm("all in one", pooled=True),
    spec.Arm("fedit + codistill", control="local"),
)


@pytest.fixture
def study():
    return spec.Spec(study=spec.Study("a test", (0, 1)), data={}, device=(), arm=ARMS)


def test_a_run_of_code_that_computes_otherwise_is_gone(tmp_path, monkeypatch):
    older = msgspec.structs.replace(outcome("fedit", 0, 5), digest=f"{spec.COMPUTATION - 1}-abc")
    results.add(tmp_path, older)  # beside it nothing is written that is read
    assert results.read(tmp_path) == {}
    line = msgspec.json.encode(
        {"arm": "fedit", "seed": 1, "digest": older.digest, "fields": "of earlier code"}
    )
    (tmp_path / results.NAME).write_bytes(line + b"\n")
    assert results.read(tmp_path) == {}
    results.add(tmp_path, outcome("fedit", 2, 5))
    assert results.read(tmp_path).keys() == {("fedit", 2)}
    assert len((tmp_path / results.NAME).read_bytes().splitlines()) == 1
    monkeypatch.setattr(spec, "COMPUTATION", spec.COMPUTATION - 1)
    assert results.read(tmp_path) == {}


def test_results_come_back_from_their_file_as_they_were_a_line_a_run(tmp_path):
    assert results.read(tmp_path) == {}
    whole = msgspec.structs.replace(
        outcome("fedit", 1, 3), machine="EPYC", code="Python 3", moved=[0.25, 1e-7], cosines=[(-0.5, 0.75)]
    )
    other = msgspec.structs.replace(whole, arm="another")
    for run in (whole, other, outcome("fedit", 0, 4), outcome("fedit", 1, 0), whole):
        results.add(tmp_path, run)
    assert results.read(tmp_path) == {
        ("another", 1): other,
        ("fedit", 0): outcome("fedit", 0, 4),
        ("fedit", 1): whole,  # the last of its arm and seed
    }
    lines = (tmp_path / results.NAME).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f'{{"arm":"{arm}"' for arm in ("another", "fedit", "fedit")
    ]


def test_a_line_of_results_is_compact():
    """Of 4,500 rows whose labels follow each other, as in clinc150."""
    seen, hits = np.arange(4500) < 2250, np.random.default_rng(0).random(4500) < 0.7
    assert len(results.packed(seen)) < 40 and len(results.packed(hits)) < 580
    assert (results.unpacked(results.packed(hits), 4500) == hits).all()


def test_a_difference_counts_each_device_alike_and_pairs_seeds_and_rows(study):
    arm, draw_rows = study.arm[2], np.random.default_rng(0)
    seen = np.arange(40) < 10
    runs = {}
    for name in (arm.name, "local"):
        for seed in (0, 1, 2):
            runs[name, seed] = flagged(name, seed, seen, *(draw_rows.random((2, 40)) < 0.5))
    del runs["local", 2]  # a seed without its control
    everything, unseen = judge.comparisons(study, runs)
    for comparison, kind in ((everything, None), (unseen, "unseen")):
        means = [results.mean_accuracy(run.members, kind) for run in runs.values()]
        assert comparison.difference == pytest.approx((means[0] + means[1] - means[3] - means[4]) / 2)
        assert (comparison.kind, comparison.seeds) == (kind, (0, 1))
        assert comparison.certainty.low < comparison.difference < comparison.certainty.high
    assert judge.comparisons(study, {key: run for key, run in runs.items() if key[0] == arm.name}) == []


@pytest.mark.parametrize("seed_sd", [0.0, 0.02])
def test_the_interval_is_as_wide_as_seeds_and_rows_make_it(seed_sd):
    """Beside the standard error by formula of crossed random effects of 6 seeds and 400 rows."""
    draw_numbers, seeds, rows = np.random.default_rng(1), 6, 400
    per_seed, per_row = draw_numbers.normal(0, seed_sd, (seeds, 1)), draw_numbers.normal(0, 0.2, (1, rows))
    differences = per_seed + per_row
    of_seeds, of_rows = differences.mean(1).var(ddof=1) / seeds, differences.mean(0).var(ddof=1) / rows
    resamples = judge.resampled([differences])
    assert resamples.std() == pytest.approx((of_seeds + of_rows) ** 0.5, rel=0.05)
    assert resamples.mean() == pytest.approx(differences.mean(), abs=0.001)
    assert bool(of_seeds > of_rows / 3) is (seed_sd > 0)  # twin: rows alone would be too narrow
    halves = judge.resampled([differences[:, :100] / 4, differences[:, 100:] * 3 / 4])
    assert halves.std() == pytest.approx(resamples.std(), rel=0.1)  # of two tasks, a seed's part is one draw
    low, high = judge.interval(resamples, 1.0)
    assert (low, high) == pytest.approx(tuple(np.quantile(resamples, [0.025, 0.975])), abs=1e-3)


def test_ps_are_corrected_for_their_number_and_intervals_agree():
    ps = [0.02, 0.001, 0.03, 0.8]
    assert [p * factor for p, factor in zip(ps, judge.holm(ps), strict=True)] == pytest.approx(
        [0.06, 0.004, 0.06, 0.8]
    )
    assert judge.holm([0.04]) == [1.0] and judge.holm([]) == []
    resamples = np.random.default_rng(0).normal(2.0, 1.0, judge.RESAMPLES)
    p = judge.p_value(resamples)
    assert p == pytest.approx(0.0455, abs=0.006)  # two standard deviations
    for factor in (1.0, 0.05 / p - 1e-6, 0.05 / p + 1e-6, 3.0, 100.0):
        low, high = judge.interval(resamples, factor)
        assert (low > 0) is (factor * p < 0.05) and high > 2
        assert judge.interval(-resamples, factor) == pytest.approx((-high, -low))


def test_an_arm_that_was_chosen_on_a_seed_claims_without_it(study, capsys):
    arms = (study.arm[0], msgspec.structs.replace(study.arm[2], chosen_on=0))
    chosen, draw_rows = msgspec.structs.replace(study, arm=arms), np.random.default_rng(0)
    runs = {}
    for seed in (0, 1, 2):
        for name, share in ((arms[1].name, 0.95 if seed == 0 else 0.6), ("local", 0.3)):
            hits = np.arange(400) < 400 * share
            runs[name, seed] = flagged(name, seed, np.ones(400, bool), draw_rows.permutation(hits))
    claim, choice = judge.comparisons(chosen, runs)
    assert (claim.seeds, choice.seeds, choice.certainty) == ((1, 2), (0,), None)
    assert (claim.difference, choice.difference) == pytest.approx((0.3, 0.65))
    assert claim.certainty.low > 0.2 and claim.certainty.p < 0.01
    everything = judge.comparisons(study, runs)  # twin: with the seed the difference is larger
    assert [each.seeds for each in everything] == [(0, 1, 2)] and everything[0].difference > 0.4
    table, differences = report.tables(chosen, runs)
    assert [(line["arm"], line["accuracy"], line["seeds"]) for line in table] == [
        ("local", "30.0 ± 0.0", "0, 1, 2"),
        ("fedit + codistill", "60.0 ± 0.0", "1, 2"),
        ("fedit + codistill *", "95.0", "0"),
    ]
    assert [(line["arm"], line["seeds"]) for line in differences] == [
        ("fedit + codistill", "1, 2"),
        ("fedit + codistill *", "0"),
    ]
    report.show(chosen, runs, "a study")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert "p" in differences[0] and differences[1]["p"] == "" and differences[1]["points"] == "+65.0"


def test_a_seed_alone_has_the_interval_of_its_rows_and_equal_arms_are_not_compared(study):
    arm, hits = study.arm[2], np.random.default_rng(0).random(300) < 0.5
    runs = {(arm.name, 0): flagged(arm.name, 0, np.ones(300, bool), hits | (np.arange(300) < 60))}
    runs["local", 0] = flagged("local", 0, np.ones(300, bool), hits)
    (found,) = judge.comparisons(study, runs)
    share = found.difference
    half = 1.96 * (share * (1 - share) / 300) ** 0.5
    assert (found.certainty.low, found.certainty.high) == pytest.approx(
        (share - half, share + half), abs=0.01
    )
    runs[arm.name, 0] = flagged(arm.name, 0, np.ones(300, bool), hits)
    assert judge.comparisons(study, runs) == []


def test_a_plan_has_the_seconds_of_runs_and_says_which_fit(study, capsys):
    runs = {("local", 0): msgspec.structs.replace(outcome("local", 0, 5), seconds=1800.0)}
    plan.show(study, {}, 1.0, 1)
    assert capsys.readouterr().out.count("+ ?") == 6  # nothing tells
    plan.show(study, runs, 1.2, 1)
    table = capsys.readouterr().out
    cells = {row.split("│")[1].strip(): row.split("│")[2:4] for row in table.splitlines() if "│" in row}
    assert {name: [cell.strip() for cell in row] for name, row in cells.items()} == {
        "local": ["1800", "- 1800"],  # seed by seed: it is the third
        "all in one": ["+ 1800 ?", "- 1800 ?"],
        "fedit + codistill": ["+ 1800 ?", "- 1800 ?"],
    }
    assert "Missing: 2.5 h of one core; 2 runs fit." in table
    plan.show(study, runs, 1.2, 2)
    assert "4 runs fit" in capsys.readouterr().out.replace("\n", " ")


def test_the_slope_is_that_of_the_power_of_the_rounds():
    assert pictures.slope([3 * round_**-0.5 for round_ in range(1, 7)]) == pytest.approx(-0.5)
    assert pictures.slope([2.0, 2.0, 2.0]) == pytest.approx(0)
