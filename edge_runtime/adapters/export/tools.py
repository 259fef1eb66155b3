"""Opens an export in the tool that it is for, and takes the logits that the tool computes.

PEFT and transformers run in this process, in float32. llama.cpp runs in a process of its own
(llama_cpp.py), as a file that llama.cpp cannot use may end the process.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from edge_runtime.adapters.export.check import Outputs, Prompts, logits
from edge_runtime.adapters.learned import Array
from edge_runtime.errors import InputError


def peft(folder: Path, base: Path, prompts: Prompts) -> Outputs:
    """An adapter in PEFT, on the folder of its base."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts of transformers that PEFT calls by their old names
        model = PeftModel.from_pretrained(_model(base), folder)
    with model.disable_adapter():
        plain = logits(model, prompts)
    return Outputs(plain, logits(model, prompts))


def transformers(folder: Path, prompts: Prompts) -> Array:
    """A model in transformers; its logits (prompts, vocabulary)."""
    return logits(_model(folder), prompts)


def llama_cpp(model: Path, adapter: Path | None, vocabulary: int, prompts: Prompts) -> list[Array]:
    """A GGUF file in llama.cpp, and the same with an adapter's file, if any.

    Raises:
        InputError: llama.cpp cannot load the files.
    """
    with TemporaryDirectory() as folder:
        output = Path(folder) / "logits.npy"
        work = (str(model), str(adapter) if adapter else None, vocabulary, prompts, str(output))
        command = [sys.executable, "-m", "edge_runtime.adapters.export.llama_cpp", json.dumps(work)]
        process = subprocess.run(command, capture_output=True)
        if process.returncode != 0:
            lines = process.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"its process ended with exit code {process.returncode}"
            raise InputError(f"llama.cpp cannot load {adapter or model}: {reason}")
        return list(np.load(output))


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
