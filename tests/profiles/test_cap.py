"""A large GPU stands for a board's: how much of it, and when it cannot."""

import msgspec
import pytest
from edge_profiles import Gpu, ProfileError, board, default_budget_bytes, gpu_cap_bytes, probe, profile_of

GIB = 2**30


def machine(gib):
    return msgspec.structs.replace(
        probe(), gpu=Gpu("NVIDIA H200", "9.0", gib * GIB, gib * GIB) if gib else None
    )


@pytest.mark.parametrize("name", ["rtx-3060-12gb", "jetson-orin-nano-8gb", "jetson-agx-orin-64gb"])
def test_the_cap_is_what_the_board_leaves_a_process(name):
    there = profile_of(board(name))
    cap_bytes = gpu_cap_bytes(board(name), machine(140))
    assert cap_bytes == there.gpu.memory_available_bytes < there.gpu.memory_total_bytes
    assert default_budget_bytes(there) < cap_bytes


def test_a_card_stands_for_itself_though_its_driver_keeps_a_little():
    there = machine(12)
    seen = msgspec.structs.replace(there.gpu, memory_total_bytes=12 * GIB - 400 * 2**20)
    assert (
        gpu_cap_bytes(board("rtx-3060-12gb"), msgspec.structs.replace(there, gpu=seen))
        < seen.memory_total_bytes
    )


@pytest.mark.parametrize(
    ("name", "gib", "said"),
    [
        ("rtx-4090-24gb", 16, r"NVIDIA H200 has 16 GiB, but rtx-4090-24gb leaves a process 2.* GiB"),
        ("rtx-4090-24gb", 0, "this machine has no GPU"),
        ("generic-x86-8gb", 16, "generic-x86-8gb has no GPU .*; boards with one: jetson-orin-nano-4gb"),
    ],
)
def test_what_cannot_stand_for_a_board_is_refused(name, gib, said):
    with pytest.raises(ProfileError, match=said):
        gpu_cap_bytes(board(name), machine(gib))
