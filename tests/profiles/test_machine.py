"""Probing: this machine, and machines made of small file trees."""

import os
from pathlib import Path

import psutil
import pytest
from edge_profiles import gpus, probe

GIB = 2**30


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Make a root folder with /proc of a machine with this much RAM, and let psutil read it."""

    def make(total_gib, available_gib, files=None):
        kib = {"MemTotal": total_gib, "MemFree": 1, "MemAvailable": available_gib, "Buffers": 0, "Cached": 1}
        kib |= {"SwapTotal": 2, "SwapFree": 2, "Shmem": 0, "Active": 1, "Inactive": 1}
        text = "".join(f"{key}: {int(gib * 2**20)} kB\n" for key, gib in kib.items())
        for name, content in {
            "proc/meminfo": text,
            "proc/vmstat": "pswpin 0\npswpout 0\n",
            **(files or {}),
        }.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
        return tmp_path

    return make


@pytest.fixture
def driver(monkeypatch):
    """Let the driver report this, or nothing."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda seen: monkeypatch.setattr(gpus, "find", lambda: seen)


ORIN_NANO = {"proc/device-tree/model": b"NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"}


def test_a_jetson_without_nvidia_smi_has_its_gpu_from_the_board_file(tree, driver):
    driver(None)
    profile = probe(tree(7.44, 5.5, ORIN_NANO))
    assert (profile.board, profile.description) == ("jetson-orin-nano-8gb", "Jetson Orin Nano 8GB")
    assert profile.unified_memory and profile.gpu.compute_capability == "8.7"
    assert profile.gpu.memory_total_bytes == profile.ram_total_bytes == int(7.44 * 2**20) * 1024
    assert profile.gpu.memory_available_bytes == profile.ram_available_bytes == int(5.5 * GIB)
    assert profile.swap_total_bytes == 2 * GIB


def test_a_jetson_whose_driver_says_little_is_filled_in(tree, driver):
    driver(gpus.Sighting("Orin (nvgpu)", None, None, None))
    profile = probe(tree(7.44, 5.5, ORIN_NANO))
    assert profile.unified_memory
    assert (profile.gpu.name, profile.gpu.compute_capability) == ("Orin (nvgpu)", "8.7")
    assert profile.gpu.memory_available_bytes == int(5.5 * GIB)


def test_a_jetson_in_a_limited_container_is_still_the_8_gb_board(tree, driver):
    driver(None)
    limit = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": str(3 * GIB)}
    limit["sys/fs/cgroup/memory.current"] = str(GIB)
    profile = probe(tree(7.44, 5.5, ORIN_NANO | limit))
    assert profile.board == "jetson-orin-nano-8gb"
    assert (profile.ram_total_bytes, profile.ram_available_bytes) == (3 * GIB, 2 * GIB)
    assert (profile.gpu.memory_total_bytes, profile.gpu.memory_available_bytes) == (3 * GIB, 2 * GIB)


def test_a_jetson_whose_device_tree_is_hidden_is_told_by_its_firmware(tree, driver):
    driver(None)
    dmi = {"sys/devices/virtual/dmi/id/product_name": "NVIDIA Jetson AGX Thor Developer Kit\n"}
    assert probe(tree(122.8, 100, dmi)).board == "jetson-agx-thor-128gb"


def test_a_hidden_gpu_of_a_jetson_stays_hidden(tree, driver, monkeypatch):
    driver(None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    profile = probe(tree(7.44, 5.5, ORIN_NANO))
    assert profile.board == "jetson-orin-nano-8gb" and profile.gpu is None


def test_an_unknown_unified_gpu_works_in_ram(tree, driver):
    driver(gpus.Sighting("NVIDIA GB10", "12.1", None, None))
    profile = probe(tree(119, 110, {"proc/cpuinfo": "model name\t: Some CPU\n"}))
    assert profile.unified_memory and profile.board is None and profile.description == "Some CPU"
    assert profile.gpu.memory_available_bytes == profile.ram_available_bytes


def test_a_card_has_its_own_memory_and_is_recognised(tree, driver):
    driver(gpus.Sighting("NVIDIA GeForce RTX 3060", None, 12 * GIB, 11 * GIB))
    profile = probe(tree(31, 20, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\n"}))
    assert (profile.board, profile.description) == ("rtx-3060-12gb", "Some CPU")
    assert not profile.unified_memory
    assert (profile.gpu.memory_total_bytes, profile.gpu.memory_available_bytes) == (12 * GIB, 11 * GIB)
    assert profile.gpu.compute_capability == "8.6"  # the driver did not say; the board file does


def test_a_machine_without_a_gpu(tree, driver):
    driver(None)
    profile = probe(tree(7.8, 6, {"proc/device-tree/model": b"Some Board\0"}))
    assert profile.gpu is None and not profile.unified_memory and profile.board is None
    assert profile.description == "Some Board"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_this_machine_agrees_with_its_kernel():
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(meminfo["MemTotal"].split()[0]) * 1024
    mounts = Path("/sys/fs/cgroup")
    files = [*mounts.glob("**/memory.max"), *mounts.glob("**/memory.limit_in_bytes")]
    limits = {int(text) for text in (file.read_text().strip() for file in files) if text.isdecimal()}
    profile = probe()
    assert profile.ram_total_bytes == total or profile.ram_total_bytes in {n for n in limits if n < total}
    assert 0 < profile.ram_available_bytes <= profile.ram_total_bytes
    if not any(limit < total for limit in limits):
        assert profile.ram_available_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert profile.swap_total_bytes == psutil.swap_memory().total
    assert 1 <= profile.cpu_cores <= len(os.sched_getaffinity(0))
    assert profile.disk_free_bytes == pytest.approx(psutil.disk_usage(".").free, rel=0.1)
    assert profile.machine == os.uname().machine
    assert profile.description
