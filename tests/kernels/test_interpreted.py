"""The operators' tests once more, with their Triton kernels in the interpreter: a GPU is not needed to see them compute."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "kernels" / "edge_kernels"
FILES = [path.relative_to(KERNELS) for path in KERNELS.rglob("*.py") if "@jit" in path.read_text()]
OPERATORS = sorted({path.parts[0].removesuffix(".py") for path in FILES})  # files and folders


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators' tests run their kernels on the GPU")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("operator", [name for name in OPERATORS if (HERE / f"test_{name}.py").exists()])
def test_the_kernels_compute_what_the_operator_promises(operator: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / f"test_{operator}.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-4000:]
