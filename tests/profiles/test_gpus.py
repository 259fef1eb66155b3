"""GPUs as NVML and nvidia-smi report them. nvidia-smi is a real program on PATH; NVML a real library built here."""

import os
import shutil
import subprocess
import time

import pytest
from edge_profiles import gpus

MIB = 2**20


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Install a shell script as nvidia-smi, first on PATH."""

    def install(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path

    return install


def test_nvidia_smi_is_read(smi):
    smi('echo "NVIDIA GeForce RTX 3060, 8.6, 12288, 11900"')
    assert gpus.ask_nvidia_smi("0") == gpus.Sighting(
        "NVIDIA GeForce RTX 3060", "8.6", 12288 * MIB, 11900 * MIB
    )


def test_nvidia_smi_is_asked_about_the_selected_gpu(smi):
    folder = smi('printf "%s\\n" "$@" > "$(dirname "$0")/arguments"; echo "GPU, 8.6, 1, 1"')
    gpus.ask_nvidia_smi("GPU-1234; rm -rf /")
    arguments = (folder / "arguments").read_text().splitlines()
    assert arguments[0] == "--id=GPU-1234; rm -rf /"  # one argument: no shell reads it
    assert "--query-gpu=name,compute_cap,memory.total,memory.free" in arguments


@pytest.mark.parametrize("unknown", ["[N/A]", "[Not Supported]"])
def test_a_gpu_that_works_in_ram_reports_no_memory_of_its_own(smi, unknown):
    smi(f'echo "Orin (nvgpu), {unknown}, {unknown}, {unknown}"')
    assert gpus.ask_nvidia_smi("0") == gpus.Sighting("Orin (nvgpu)", None, None, None)


@pytest.mark.parametrize(
    "script",
    [
        "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
        "echo 'No devices were found'",
        "echo 'NVIDIA GeForce RTX 3060, 8.6, twelve, 11900'",
        "echo ', 8.6, 1, 1'",
        "echo 'a, b, c, d'",
        "head -c 4096 /dev/urandom",
        ":",
        "kill -9 $$",
    ],
)
def test_junk_and_failure_are_no_gpu(smi, script):
    smi(script)
    assert gpus.ask_nvidia_smi("0") is None


def test_a_file_that_cannot_be_run_is_no_gpu(smi):
    folder = smi("")
    (folder / "nvidia-smi").write_bytes(b"\x7fELF not a program")
    assert gpus.ask_nvidia_smi("0") is None


def test_no_nvidia_smi_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.ask_nvidia_smi("0") is None


def test_nvidia_smi_that_hangs_is_given_up(smi, caplog):
    smi('echo "NVIDIA GeForce RTX 3060, 8.6, 12288, 11900"; exec tail -f /dev/null')
    began = time.monotonic()
    assert gpus.ask_nvidia_smi("0", timeout_s=0.3) is None
    assert 0.3 <= time.monotonic() - began < 30
    assert "did not answer within 0.3 s" in caplog.text


def test_nvml_that_hangs_is_given_up_and_nvidia_smi_is_asked(smi, monkeypatch):
    smi('echo "NVIDIA GeForce RTX 3060, 8.6, 12288, 11900"')
    stuck = gpus.threading.Event()
    monkeypatch.setattr(gpus, "ask_nvml", lambda gpu: stuck.wait(60) and None)
    try:
        seen = gpus.find(timeout_s=0.3)
    finally:
        stuck.set()
    assert seen is not None and seen.name == "NVIDIA GeForce RTX 3060"


@pytest.mark.parametrize("value", ["", "-1"])
def test_cuda_visible_devices_hides_every_gpu(smi, monkeypatch, value):
    smi('echo "NVIDIA GeForce RTX 3060, 8.6, 12288, 11900"')
    monkeypatch.setattr(gpus, "ask_nvml", lambda gpu: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert gpus.find() is not None and gpus.selected() == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert gpus.find() is None and gpus.hidden()


NVML = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static int device, shut;
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return shut++; }
int shutdowns(void) { return shut; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **d) { *d = &device; return index == 1 ? 0 : 2; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **d) { *d = &device; return strcmp(uuid, "GPU-7") ? 6 : 0; }
int nvmlDeviceGetName(void *d, char *name, unsigned n) { strncpy(name, "NVIDIA Test", n); return d != &device; }
int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor) { *major = 8; *minor = 7; return d != &device; }
int nvmlDeviceGetMemoryInfo(void *d, memory_t *m) { *m = (memory_t){5ULL << 32, 3ULL << 32, 0}; return MEMORY; }
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory):
    """Build a library with NVML's functions, as its header declares them."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def build(name, init=0, memory=0, source=NVML):
        folder = tmp_path_factory.mktemp(name)
        (folder / "nvml.c").write_text(source)
        command = [
            compiler,
            "-shared",
            "-fPIC",
            f"-DINIT={init}",
            f"-DMEMORY={memory}",
            "-o",
            f"{folder}/nvml.so",
        ]
        subprocess.run([*command, f"{folder}/nvml.c"], check=True)
        return f"{folder}/nvml.so"

    return build


def test_nvml_is_read_by_index_and_by_uuid_and_shut_down(nvml):
    library = nvml("whole")
    expected = gpus.Sighting("NVIDIA Test", "8.7", 5 << 32, 3 << 32)
    assert gpus.ask_nvml("1", library) == expected
    assert gpus.ask_nvml("GPU-7", library) == expected
    assert gpus.ask_nvml("0", library) is None
    assert gpus.ask_nvml("GPU-8", library) is None
    assert gpus.ctypes.CDLL(library).shutdowns() == 4


def test_nvml_of_a_gpu_that_works_in_ram(nvml):
    assert gpus.ask_nvml("1", nvml("unified", memory=3)) == gpus.Sighting("NVIDIA Test", "8.7", None, None)


def test_nvml_that_will_not_start_lacks_functions_or_is_missing_is_no_gpu(nvml, tmp_path):
    assert gpus.ask_nvml("1", nvml("dead", init=9)) is None
    assert gpus.ask_nvml("1", nvml("stub", source="int nvmlInit_v2(void) { return 0; }")) is None
    assert gpus.ask_nvml("1", str(tmp_path / "none.so")) is None
