"""The operators' tests once more, with their Triton kernels in the interpreter: a GPU is not needed to see them compute."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# an operator with kernels asks `on_triton` in its test what the interpreter cannot do
TESTS = [str(path) for path in sorted(HERE.glob("test_*.py")) if "import on_triton\n" in path.read_text()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators' tests run their kernels on the GPU")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernels_compute_what_the_operators_promise() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-4000:]
