"""The benchmark's arithmetic, its fairness, and its reports; no test looks at how long anything took."""

import json
import math
from dataclasses import fields, replace
from importlib import import_module

import pytest
import torch
from click.testing import CliRunner
from edge_kernels.quant import BLOCK, expand, pack
from numerics import DEVICE

from benchmarks.kernels import cases, measure
from benchmarks.kernels.__main__ import bench
from benchmarks.kernels.cases import OPERATORS, between, blocks, linear, variants
from benchmarks.kernels.cases.case import OURS, Case, Shape, Variant
from benchmarks.kernels.measure import Measured, Rates, Result, relative_error
from benchmarks.kernels.picture import picture, save

TINY = Shape("tiny", hidden=64, intermediate=96, heads=4, kv_heads=2, width=16, vocabulary=100, layers=2)
MACHINE = Rates(bytes_per_s=1e9, flops_per_s=1e10, peak_noise_bytes=0)
ON = torch.device(DEVICE)
EACH = [(operator, kind) for operator, (kinds, _) in OPERATORS.items() for kind in kinds]


def case_of(operator, kind, tokens=32, shape=TINY):
    return next(case for case in cases.select([shape], [tokens], [operator]) if case.kind == kind)


def made_up(**variants):
    """A case whose variants are these functions."""
    ready = {name.replace("_", " "): Variant(run) for name, run in variants.items()}
    return Case("made up", "", TINY, 32, 4_000_000, 1000, lambda device: ready)


# --- what is counted


def test_bytes_and_flops_of_an_adapter_linear():
    M, N, K, r = 32, 96, 64, 16
    case = case_of("adapter_linear", "dense", M)
    assert case.flops == 4 * M * N * K + 6 * M * r * (N + K)
    forward = 2 * M * K + 2 * N * K + 2 * M * N + 4 * r * (N + K)
    backward = 2 * M * N + 2 * N * K + 2 * M * K + 2 * M * K + 2 * 4 * r * (N + K)
    assert case.bytes == forward + backward


def test_bytes_and_flops_of_others():
    M, H, inner, V = 32, 64, 96, 100
    head = case_of("linear_cross_entropy", "dense")
    assert (head.bytes, head.flops) == (2 * V * H + 2 * 2 * M * H + 8 * M, 4 * M * V * H)
    assert case_of("gated_activation", "silu").bytes == 2 * 8 * M * inner
    assert case_of("rotary", "").bytes == 2 * 2 * (2 * M * 6 * 16 + 2 * M * 16)
    seen = case_of("attention", "")  # 4 heads, 2 key heads of 16
    assert (seen.bytes, seen.flops) == (2 * 2 * M * 16 * (4 + 2 + 2 + 4), 14 * (M * M // 2) * 4 * 16)
    assert (
        case_of("checkpoint_block", "").flops == blocks.BLOCKS * (3 + 2 + 3) * 2 * M * H * inner
    )  # down once forward


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize("into", [64, 72, 200])
def test_bytes_of_a_packed_weight_are_those_it_has(kind, into):
    parts = pack(torch.randn(130, into), kind).parts
    assert variants.weight_bytes(130, into, kind) == sum(part.nbytes for part in parts if part is not None)


@pytest.mark.parametrize("kind", BLOCK)
def test_what_rivals_expand_is_the_matrix(kind):
    packed = pack(torch.randn(70, 200), kind).to(DEVICE)
    assert torch.equal(linear._whole(packed)(), expand(packed, torch.bfloat16))


def test_floors_are_the_counts_over_the_rates():
    assert measure.floors(made_up(), MACHINE) == (4e6 / 1e9, 1000 / 1e10)


# --- that a comparison is one


@pytest.mark.parametrize(("operator", "kind"), EACH)
def test_every_variant_computes_the_same(operator, kind):
    case = case_of(operator, kind)
    torch.manual_seed(0)
    ready = case.prepare(ON)
    assert len(ready) > 1 and next(iter(ready)) == OURS
    errors: dict[str, str] = {}
    assert measure._compare(ready, errors).keys() == ready.keys(), errors
    outcome = ready[OURS].run()
    assert all(part.isfinite().all() and part.norm() > 0 for part in outcome)
    assert len(outcome) > 1  # gradients, too


def test_a_missing_scale_is_seen(monkeypatch):
    ours = linear.adapter_linear
    monkeypatch.setattr(
        linear, "adapter_linear", lambda x, weight, A, C, B, scale: ours(x, weight, A, C, B, 1.0)
    )
    errors: dict[str, str] = {}
    assert measure._compare(case_of("adapter_linear", "dense").prepare(ON), errors).keys() == {OURS}
    assert "computes something else" in errors["torch"]


def test_a_rival_that_computes_something_else_is_named_and_not_timed():
    truth = torch.ones(4)
    case = made_up(ours=lambda: [truth], slip=lambda: [1.01 * truth], zero=lambda: [0 * truth])
    result = measure.run(case, ON, MACHINE, budget_s=0)
    assert result.variants.keys() == {"ours", "slip"} and result.errors.keys() == {"zero"}
    assert "something else: relative error 1.000 against ours" in result.errors["zero"]


def test_arguments_that_are_overwritten_are_made_anew():
    x = torch.ones(3, device=ON, requires_grad=True)

    def spoils(x):
        y = 2 * x
        x.data.zero_()
        return y

    variant = variants.overwriting(spoils, [x], [torch.ones(3, device=ON)])
    for _ in range(2):
        variant.before()
        assert torch.equal(variant.run()[0], 2 * torch.ones(3, device=ON))
    assert not variant.run()[0].any()  # without: this check can fail


def test_variants_run_in_turns_and_each_comes_first():
    ran = []
    runs = {name: lambda name=name: ran.append(name) or [torch.ones(1)] for name in ("ours", "one", "two")}
    measure._rounds({name: Variant(run) for name, run in runs.items()}, ON, budget_s=0)
    rounds = [ran[first : first + 3] for first in range(0, len(ran), 3)]
    assert all(sorted(names) == ["one", "ours", "two"] for names in rounds)
    assert {names[0] for names in rounds} == {"one", "ours", "two"}
    assert len(rounds) >= measure.ROUNDS + measure.WARM


# --- what is reported


def test_a_result_has_every_field_and_its_ratios_are_right():
    case = case_of("gated_activation", "silu")
    result = measure.run(case, ON, MACHINE, budget_s=0)
    bytes_s, flops_s = case.bytes / 1e9, case.flops / 1e10
    assert (result.floor_bytes_s, result.floor_flops_s) == (bytes_s, flops_s)
    assert not result.errors and {"ours", "torch"} <= result.variants.keys()
    for name, it in result.variants.items():
        assert 0 < it.p20_s <= it.median_s <= it.p80_s and it.runs >= measure.ROUNDS
        assert it.to_slower_floor == it.median_s / max(bytes_s, flops_s)
        assert it.to_faster_floor == it.median_s / min(bytes_s, flops_s)
        assert name == OURS or result.ours_to[name] == result.variants[OURS].median_s / it.median_s
        assert all(
            getattr(it, field.name) is not None for field in fields(Measured) if field.name != "peak_bytes"
        )


def test_the_peak_of_a_buffer_is_its_size():
    size = 96 << 20
    peak = measure._peak(ON, lambda: torch.ones(size, dtype=torch.uint8, device=ON))
    if peak is None:
        pytest.skip("this system does not set the peak back")
    assert abs(peak - size) < 8 << 20
    two = measure._peak(ON, lambda: [torch.ones(size, dtype=torch.uint8, device=ON) for _ in range(2)])
    assert two is not None and abs(two - 2 * size) < 8 << 20


def test_running_out_of_memory_is_reported_and_not_fatal():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    result = measure.run(made_up(ours=full, torch=lambda: [torch.ones(1)]), ON, MACHINE, budget_s=0)
    assert (
        result.errors == {"ours": "out of memory"}
        and result.variants.keys() == {"torch"}
        and not result.ours_to
    )
    nothing = replace(made_up(), prepare=lambda device: full())
    assert measure.run(nothing, ON, MACHINE).errors == {"all": "out of memory"}


def made_results():
    measured = Measured(1e-3, 9e-4, 2e-3, 5, 1 << 20, 1 << 20, 1.5, 30.0, 0.0)
    return [
        Result("norm & co", "<q>", "tiny", tokens, 10, 10, 1e-4, 1e-5, {OURS: measured, "a < b": measured})
        for tokens in (32, 256)
    ]


@pytest.mark.parametrize("results", [[], made_results()[:1], made_results()])
def test_the_picture_has_a_line_for_each_variant_and_the_floor(results, tmp_path):
    figure = picture(results, ["a machine & its $ versions"])
    lines = [line for axes in figure.axes for line in axes.lines]
    assert [len(line.get_xdata()) for line in lines] == [len(results)] * (3 if results else 0)
    assert all(math.isfinite(number) for line in lines for number in (*line.get_xdata(), *line.get_ydata()))
    save(figure, tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()


@pytest.fixture
def small(monkeypatch):
    """The command on the tiny shape and a machine that is known."""
    module = import_module("benchmarks.kernels.__main__")
    monkeypatch.setattr(module, "SMALL", TINY)
    monkeypatch.setattr(measure, "rates", lambda device: MACHINE)
    monkeypatch.setattr(measure, "BUDGET_S", {"cpu": 0.0, "cuda": 0.0})
    return lambda *arguments: CliRunner().invoke(bench, arguments)


def test_the_command_writes_numbers_tables_and_a_picture(small, tmp_path):
    file, image = tmp_path / "new" / "out.jsonl", tmp_path / "out.png"
    done = small(
        "--quick", "--only", "rms_norm", "--only", "rotary", "--json", str(file), "--picture", str(image)
    )
    assert done.exit_code == 0, done.output
    report, *measured = map(json.loads, file.read_text().splitlines())
    assert [(case["operator"], case["tokens"]) for case in measured] == [
        (operator, tokens) for operator in ("rms_norm", "rotary") for tokens in (32, 256, 1024)
    ]
    assert report["versions"]["torch"] == torch.__version__ and report["rates"]["bytes_per_s"] == 1e9
    assert report["machine"] and report["date"]
    assert image.read_bytes().startswith(b"\x89PNG")
    for text in (done.output, file.with_suffix(".txt").read_text()):
        assert "rms_norm" in text and "ours / best rival" in text


def test_what_a_cpu_would_take_too_long_for_is_left_out_in_words(small, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "rates", lambda device: replace(MACHINE, flops_per_s=1e3))
    done = small("--device", "cpu", "--only", "rms_norm", "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0, done.output
    assert "left out on a CPU: Llama-3.2-1B" in done.output
    assert "rms_norm Qwen2.5-0.5B 1024 tokens, all: left out: a run takes at least" in done.output


def test_an_operator_that_fails_fails_the_command(small, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("the kernel is broken")

    monkeypatch.setattr(between, "rms_norm", broken)
    done = small("--quick", "--only", "rms_norm", "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 1 and "the kernel is broken" in done.output


def test_bad_input_is_named(small, monkeypatch):
    done = small("--only", "nothing")
    assert done.exit_code == 2 and all(name in done.output for name in OPERATORS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = small("--device", "cuda")
    assert done.exit_code == 1 and "--device cuda needs a GPU" in done.output


def test_relative_error_is_that_of_norms():
    assert relative_error(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
