"""What compiles is judged: kernels made to fail do so, each for its reason."""

import importlib.util
import json

import pytest
from click.testing import CliRunner
from edge_kernels import ahead
from edge_kernels.__main__ import main

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def compiled():
    return {one.name: one for one in ahead.compile_all(["faulty_kernels"], (87,))}


@needs_triton
def test_a_good_kernel_passes_with_its_figures(compiled):
    good = compiled["good"]
    assert good.faults == ()
    assert good.asynchronous_copies > 0
    assert 16 < good.registers < 256
    assert 0 < good.shared_bytes < 163 << 10
    assert good.instructions > 100


@needs_triton
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("too many registers", "spills"),
        ("too much shared memory", "but a program of sm_87 has 166912"),
        ("single loads", "no asynchronous copies"),
    ],
)
def test_a_bad_kernel_fails_for_its_reason(compiled, name, word):
    assert word in "; ".join(compiled[name].faults)


@needs_triton
def test_the_command_says_what_is_wrong_and_exits_with_1(monkeypatch, tmp_path):
    monkeypatch.setattr(ahead, "operators", lambda: ["faulty_kernels"])
    done = CliRunner().invoke(main, ["check", "--arch", "87", "--json", str(tmp_path / "seen.json")])
    assert done.exit_code == 1
    assert "too many registers on sm_87: spills" in done.output
    assert "4 configurations, 3 faulty" in done.output
    assert len(json.loads((tmp_path / "seen.json").read_text())) == 4


def test_an_unknown_operator_is_refused_by_name():
    done = CliRunner().invoke(main, ["check", "--only", "sorcery"])
    assert done.exit_code == 2
    assert "sorcery is no operator with kernels; these are: adamw8bit" in done.output


def test_every_file_with_kernels_is_found():
    assert {
        "edge_kernels.packed_linear",
        "edge_kernels.linear_cross_entropy",
        "edge_kernels.norms",
    } <= set(ahead.operators())
