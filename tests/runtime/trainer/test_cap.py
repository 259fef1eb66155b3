"""The trainer's share of a GPU, with torch.cuda standing in for itself."""

from types import SimpleNamespace

import msgspec
import pytest
import torch
from jobs import job_of

from edge_runtime.cli.options import gpu_cap_bytes
from edge_runtime.errors import InputError
from edge_runtime.protocol.plan import Plan
from edge_runtime.trainer import run
from edge_runtime.trainer.job import Machine
from edge_runtime.trainer.meter import prepare

GIB = 2**30


@pytest.fixture
def told(monkeypatch):
    """What was asked of a GPU of 16 GiB."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    return asked


def cap_gpu(cap_bytes):
    prepare(Machine(device="cuda", gpu_cap_bytes=cap_bytes))


def test_the_cap_is_a_share_of_what_the_gpu_has(told):
    cap_gpu(4 * GIB)
    cap_gpu(16 * GIB)
    assert told == [0.25, 1.0]


def test_a_gpu_that_has_less_is_refused(told):
    with pytest.raises(InputError, match="the GPU has 16 GiB and cannot be capped to 17 GiB"):
        cap_gpu(17 * GIB)
    assert not told


def test_a_job_is_capped_before_anything_else_is_done(told, tiny_facts, tmp_path, monkeypatch):
    plan = Plan("tiny", "tiny", 4, 4, "bfloat16", 4, 8, 2, {}, 1.0)
    job = job_of(
        train=True,
        round=1,
        facts=tiny_facts,
        plan=plan,
        depths=(4,),
        data="",
        evaluation={},
        device="cuda",
        gpu_cap_bytes=4 * GIB,
    )
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(job))

    def meter(device, say):
        raise InterruptedError(device)

    monkeypatch.setattr(run, "Meter", meter)
    with pytest.raises(InterruptedError, match="cuda"):
        run.run(tmp_path, run.Bases(), lambda progress: None)
    assert told == [0.25]


def test_a_cap_is_a_gpus():
    from edge_profiles import Gpu, probe

    found = msgspec.structs.replace(probe(), gpu=Gpu("NVIDIA H200", "9.0", 140 * GIB, 140 * GIB))
    assert gpu_cap_bytes(None, "cpu", found) is None
    assert (
        gpu_cap_bytes("rtx-3060-12gb", "auto", found)
        == gpu_cap_bytes("rtx-3060-12gb", "cuda", found)
        < 12 * GIB
    )
    with pytest.raises(
        InputError, match="--board caps a GPU's memory, but --device is cpu: use --device cuda"
    ):
        gpu_cap_bytes("rtx-3060-12gb", "cpu", found)
