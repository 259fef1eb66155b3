"""The meter's views of memory: of this process as Linux counts it, and of a GPU as a stand-in for torch.cuda tells it."""

import mmap
from types import SimpleNamespace

import msgspec
import pytest
import torch

from edge_runtime.protocol.report import PhaseMemory
from edge_runtime.trainer import meter

MIB = 1 << 20


def measured(run, device="cpu"):
    of = meter.Meter(device)
    with of.phase("train"):
        kept = run()
    del kept
    return of.phases["train"]


def touched():
    """64 MiB that no heap has left from earlier tests, each page in use."""
    area = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:: mmap.PAGESIZE] = b"\1" * (len(area) // mmap.PAGESIZE)
    return area


def held(device):
    """Bytes that a line of progress says the process holds."""
    told = []
    meter.Meter(device, told.append).tell("train")
    return told[0].memory_bytes


def test_a_peak_inside_a_phase_is_seen_after_it_has_passed():
    idle = measured(lambda: None)
    passed = measured(lambda: len(touched()))
    assert passed.peak_bytes - idle.peak_bytes == pytest.approx(64 * MIB, abs=8 * MIB)
    assert abs(passed.anonymous_bytes - idle.anonymous_bytes) < 8 * MIB


def test_mapped_files_are_told_from_anonymous_memory(tmp_path):
    (tmp_path / "file").write_bytes(bytes(32 * MIB))

    def read():
        with (tmp_path / "file").open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        return mapped

    idle, mapped, held = (measured(lambda: None), measured(read), measured(touched))
    assert mapped.file_mapped_bytes - idle.file_mapped_bytes == pytest.approx(32 * MIB, abs=4 * MIB)
    assert mapped.anonymous_bytes - idle.anonymous_bytes < 8 * MIB
    assert held.anonymous_bytes - idle.anonymous_bytes == pytest.approx(64 * MIB, abs=8 * MIB)


def test_without_a_gpu_its_figures_are_left_out():
    told = msgspec.to_builtins(measured(lambda: None)).keys() - {"cgroup_peak_bytes"}
    assert told == {"peak_bytes", "anonymous_bytes", "file_mapped_bytes"}


def test_a_phase_that_runs_twice_keeps_the_higher_of_each_figure(monkeypatch):
    seen = iter([PhaseMemory(5, anonymous_bytes=3, file_mapped_bytes=2), PhaseMemory(4, anonymous_bytes=4)])
    of = meter.Meter("cpu")
    monkeypatch.setattr(of, "_memory", lambda: next(seen))
    for _ in range(2):
        with of.phase("train"):
            pass
    assert of.phases == {"train": PhaseMemory(5, anonymous_bytes=4, file_mapped_bytes=2)}


@pytest.mark.parametrize("within", ["load", "frame"])
def test_a_phase_inside_another_hides_nothing_of_it_and_adds_nothing_to_it(within):
    of = meter.Meter("cpu")
    with of.phase("load"):
        if within == "load":
            len(touched())
        with of.phase("frame"):
            if within == "frame":
                len(touched())
    load, frame = (of.phases[name].peak_bytes for name in ("load", "frame"))
    larger = load - frame if within == "load" else frame - load
    assert larger == pytest.approx(64 * MIB, abs=8 * MIB)
    assert of.seconds["load"] >= of.seconds["frame"]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(integrated): what torch tells of a GPU of 8 GiB, 3 of them free."""

    def make(integrated):
        told = {
            "get_device_properties": lambda _: SimpleNamespace(
                is_integrated=integrated, total_memory=8192 * MIB
            ),
            "reset_peak_memory_stats": lambda: None,
            "memory_reserved": lambda: 40 * MIB,
            "max_memory_allocated": lambda: 50 * MIB,
            "max_memory_reserved": lambda: 60 * MIB,
            "mem_get_info": lambda: (3072 * MIB, 8192 * MIB),
        }
        for name, answer in told.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    return make


def test_a_gpu_of_its_own_memory_is_measured_by_the_allocators_reserve(gpu):
    gpu(0)
    seen = measured(lambda: None, "cuda")
    assert seen.peak_bytes == seen.reserved_peak_bytes == 60 * MIB
    assert (seen.allocated_peak_bytes, seen.driver_bytes) == (50 * MIB, 5120 * MIB)
    assert seen.resident_peak_bytes > 100 * MIB
    assert held("cuda") == 40 * MIB


def test_on_unified_memory_the_peak_is_the_allocators_and_the_processs_own(gpu):
    gpu(1)
    seen = measured(lambda: None, "cuda")
    assert seen.peak_bytes == 60 * MIB + seen.resident_peak_bytes
    assert held("cuda") > 140 * MIB
