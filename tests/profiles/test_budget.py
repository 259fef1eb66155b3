"""The default budget: the rule of its docstring, on numbers worked out by hand."""

import pytest
from edge_profiles import Gpu, Profile, default_budget_bytes
from msgspec.structs import replace

MIB, GIB = 2**20, 2**30

CPU = Profile(
    board=None,
    description="a CPU",
    os="Linux",
    machine="x86_64",
    cpu_cores=4,
    ram_total_bytes=16 * GIB,
    ram_available_bytes=10_000 * MIB,
    swap_total_bytes=8 * GIB,
    disk_free_bytes=GIB,
    unified_memory=False,
    gpu=None,
)
CARD = Gpu("card", "8.6", 8 * GIB, 7000 * MIB)


def test_without_a_gpu_it_is_85_percent_of_available_ram_less_256_mib():
    assert default_budget_bytes(CPU) == (8500 - 256) * MIB


def test_with_unified_memory_it_is_the_rule_of_ram_whatever_the_gpu_claims():
    jetson = replace(CPU, unified_memory=True, gpu=Gpu("Orin", "8.7", 16 * GIB, 15 * GIB))
    assert default_budget_bytes(jetson) == (8500 - 256) * MIB


def test_with_a_card_it_is_its_available_memory_less_a_sixteenth_of_its_total():
    assert default_budget_bytes(replace(CPU, gpu=CARD)) == (7000 - 512) * MIB


def test_a_small_card_keeps_256_mib():
    assert (
        default_budget_bytes(replace(CPU, gpu=Gpu("card", "7.5", 2 * GIB, 1900 * MIB))) == (1900 - 256) * MIB
    )


def test_a_card_that_does_not_say_what_is_available_counts_in_full():
    assert (
        default_budget_bytes(replace(CPU, gpu=replace(CARD, memory_available_bytes=None)))
        == (8192 - 512) * MIB
    )


@pytest.mark.parametrize("available", [0, 100 * MIB, 256 * MIB])
def test_it_never_falls_below_zero(available):
    assert default_budget_bytes(replace(CPU, ram_available_bytes=available)) == 0
    assert default_budget_bytes(replace(CPU, gpu=replace(CARD, memory_available_bytes=available))) == 0
