"""The board files: complete, sourced, plausible, and agreeing with the arithmetic their sources state."""

import re

import msgspec
import pytest
from edge_profiles import ProfileError, board, boards, default_budget_bytes, known, profile_of

GIB = 2**30
BOARDS = sorted(boards().values(), key=lambda b: b.name)
each = pytest.mark.parametrize("b", BOARDS, ids=lambda b: b.name)


def test_the_promised_boards_are_there():
    promised = {f"jetson-{name}gb" for name in ("orin-nano-4", "orin-nano-8", "orin-nx-8", "orin-nx-16")}
    promised |= {f"jetson-{name}gb" for name in ("agx-orin-32", "agx-orin-64", "agx-thor-128")}
    promised |= {"jetson-xavier-nx-8gb", "jetson-xavier-nx-16gb"}
    cards = "3050-6 3050-8 3060-12 3060-ti-8 3070-8 3080-10 3090-24 4060-8 4060-ti-8 4060-ti-16 4070-12 4080-16 4090-24"
    cards += " 5060-8 5060-ti-8 5060-ti-16 5070-12 5080-16 5090-32"
    promised |= {f"rtx-{card}gb" for card in cards.split()}
    promised |= {f"raspberry-pi-5-{size}gb" for size in (4, 8, 16)}
    promised |= {f"generic-x86-{size}gb" for size in (8, 16, 32)}
    assert set(boards()) == promised


@each
def test_a_board_is_plausible(b):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-\d+gb", b.name)
    assert b.machine in ("x86_64", "aarch64")
    assert 4 * GIB <= b.memory_bytes <= 128 * GIB
    assert 0.05 <= b.reserved_bytes / b.memory_bytes <= 0.45
    assert 4 <= b.cpu_cores <= 16
    size_in_name = int(re.search(r"(\d+)gb$", b.name)[1]) * GIB
    memory = b.gpu.memory_bytes if b.gpu is not None and b.gpu.memory_bytes is not None else b.memory_bytes
    assert memory == size_in_name
    if b.gpu is not None:
        assert re.fullmatch(r"\d+\.\d", b.gpu.compute_capability)
        assert 7.0 <= float(b.gpu.compute_capability) <= 12.1
        assert b.memory_bandwidth_gb_s is not None


@each
def test_figures_agree_with_the_arithmetic_in_their_sources(b):
    stated = {}
    if bus := re.search(r"([\d.]+) bit at ([\d.]+) Gb/s", b.sources.get("memory_bandwidth_gb_s", "")):
        stated["memory_bandwidth_gb_s"] = float(bus[1]) * float(bus[2]) / 8
    if sm := re.search(r"(\d+) SM x (\d+) flop at ([\d.]+) GHz", b.sources.get("bf16_dense_tflops", "")):
        stated["bf16_dense_tflops"] = int(sm[1]) * int(sm[2]) * float(sm[3]) / 1000
    for name in ("memory_bandwidth_gb_s", "bf16_dense_tflops"):
        assert (getattr(b, name) is None) == (name not in stated), f"{name} has no arithmetic in its source"
    for name, figure in stated.items():
        assert getattr(b, name) == pytest.approx(figure, rel=0.005), name


@each
def test_a_profile_of_a_board_leaves_room_to_train(b):
    profile = profile_of(b)
    assert profile.board == b.name and profile.unified_memory == b.unified_memory
    assert profile.ram_available_bytes == b.memory_bytes - b.reserved_bytes
    memory = profile.ram_available_bytes
    if profile.unified_memory:
        assert (profile.gpu.memory_total_bytes, profile.gpu.memory_available_bytes) == (
            b.memory_bytes,
            memory,
        )
    elif profile.gpu is not None:
        memory = profile.gpu.memory_available_bytes
        assert memory == b.gpu.memory_bytes - b.gpu.reserved_bytes
    assert 0.7 * memory < default_budget_bytes(profile) < 0.98 * memory


@each
def test_a_profile_travels_as_json(b):
    profile = profile_of(b)
    assert msgspec.json.decode(msgspec.json.encode(profile), type=type(profile)) == profile


def test_a_board_is_found_by_name():
    b = board("jetson-orin-nano-8gb")
    assert (b.title, b.memory_bytes, b.gpu.compute_capability) == ("Jetson Orin Nano 8GB", 8 * GIB, "8.7")


def test_an_unknown_board_names_the_nearest_and_all():
    with pytest.raises(ProfileError) as caught:
        board("Jetson-Orin-Nano-8G")
    message = str(caught.value)
    assert "'Jetson-Orin-Nano-8G' is not known" in message
    assert "did you mean jetson-orin-nano-8gb" in message
    assert all(name in message for name in boards())
    with pytest.raises(ProfileError, match=r"not known: Known boards: generic"):
        board("zzz")


def test_what_a_caller_does_to_the_dict_stays_with_the_caller():
    boards().clear()
    assert board("raspberry-pi-5-8gb")


@pytest.mark.parametrize(
    ("model", "ram_gib", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.44, "jetson-orin-nano-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 3.4, "jetson-orin-nano-4gb"),
        ("NVIDIA Orin NX Developer Kit", 14.15, "jetson-orin-nx-16gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 61.4, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 29.8, "jetson-agx-orin-32gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122.8, "jetson-agx-thor-128gb"),
        ("NVIDIA Jetson Xavier NX Developer Kit", 6.8, "jetson-xavier-nx-8gb"),
        ("Raspberry Pi 5 Model B Rev 1.0", 7.86, "raspberry-pi-5-8gb"),
        (
            "Raspberry Pi 5 Model B Rev 1.1",
            1.98,
            None,
        ),  # a 2 GB one: not a 4 GB one with half its memory gone
        ("Raspberry Pi 4 Model B Rev 1.4", 7.6, None),
        ("NVIDIA Jetson AGX Xavier Developer Kit", 30.2, None),
        ("NVIDIA Jetson Orin Nano Developer Kit", 30, None),
    ],
)
def test_a_device_tree_model_and_ram_tell_the_board(model, ram_gib, name):
    found = known.recognise_model(model, int(ram_gib * GIB))
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("gpu", "memory_mib", "name"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060", 8192, None),  # the later 8 GB variant is another card
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6144, None),
        ("NVIDIA GeForce RTX 3050", 6144, "rtx-3050-6gb"),
        ("NVIDIA GeForce RTX 3050", 8192, "rtx-3050-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24gb"),
        ("NVIDIA H200", 143771, None),
    ],
)
def test_a_gpus_name_and_memory_tell_the_card(gpu, memory_mib, name):
    found = known.recognise_gpu(gpu, memory_mib * 2**20)
    assert (found.name if found else None) == name


GOOD = """
[shared]
machine = "aarch64"
unified_memory = false
checked = 2026-01-31
[shared.sources]
memory_bytes = "data sheet"
reserved_bytes = "allowance"
[[boards]]
name = "test-2gb"
title = "Test"
memory_bytes = "2GiB"
reserved_bytes = 1000
cpu_cores = 4
[boards.sources]
cpu_cores = "data sheet"
"""


def load(folder, text, name="test.toml"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return known._load(folder)


def test_a_board_file_joins_what_is_shared_with_what_is_its_own(tmp_path):
    b = load(tmp_path / "boards", GOOD)["test-2gb"]
    assert (b.memory_bytes, b.reserved_bytes, b.machine) == (2 * GIB, 1000, "aarch64")
    assert b.sources.keys() == {"memory_bytes", "reserved_bytes", "cpu_cores"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('cpu_cores = "data sheet"', "", "no source for cpu_cores"),
        ('memory_bytes = "data sheet"', 'memory_bytes = " "', "no source for memory_bytes"),
        ("cpu_cores = 4", "cpu_cores = 4\nmemory_bandwidth_gb_s = 9", "no source for memory_bandwidth_gb_s"),
        ("[boards.sources]", '[boards.sources]\nbf16_dense_tflops = "x"', "a source for bf16_dense_tflops"),
        ("cpu_cores = 4", "cpu_cores = 4\ncolour = 1", "unknown field `colour`"),
        ("cpu_cores = 4", "", "missing required field `cpu_cores`"),
        ('"2GiB"', '"2G"', "'2G' is not understood"),
        ("reserved_bytes = 1000", 'reserved_bytes = "2GiB"', "leave nothing"),
        ("unified_memory = false", "unified_memory = true", "unified_memory needs a gpu"),
        ("checked = 2026-01-31", "", "missing required field `checked`"),
        ("[shared]", "[shared", "board '\\?'"),
        ("[[boards]]", "[[board]]", "unknown field|missing required field"),
        (
            "[boards.sources]",
            '[boards.gpu]\nname = "x"\ncompute_capability = "8.7"\n[boards.sources]',
            "has either",
        ),
    ],
)
def test_a_board_file_with_a_fault_is_refused_by_name(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ProfileError, match=rf"(?i)^test\.toml: .*({message}).*README"):
        load(tmp_path / "boards", GOOD.replace(old, new, 1))


def test_two_boards_of_one_name_are_refused(tmp_path):
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards/a.toml").write_text(GOOD)
    with pytest.raises(ProfileError, match=r"test\.toml: board 'test-2gb' is defined twice"):
        load(tmp_path / "boards", GOOD)
