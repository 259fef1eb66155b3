"""What a GGUF file's matrices lose when they are packed in another format than the file's.

    python -m benchmarks.repacking            prints the table
    python -m benchmarks.repacking --write    writes the table to docs/models.md

A matrix of normal values is rounded to the file's format, and read as a trainer reads it. An error
is the root mean square of the difference to the file's values, as a share of theirs.
"""

import argparse
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from edge_kernels import expand

from benchmarks import gguf_models
from benchmarks.models import PAGE
from edge_runtime.models.gguf_file import GGUFTensors, Tensor
from edge_runtime.settings import PACKED

FILE_FORMATS = ("F16", "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0")
SHAPE = (512, 1024)
HEAD = "| in the file |"


def error(file_format: str, weights: str) -> float:
    """The error of a matrix of a file in a format of `weights`; 0 where the blocks are kept."""
    kind = gguf.GGMLQuantizationType[file_format]
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "matrix")
        gguf_models.quantise(values, kind).tofile(file)
        tensors = GGUFTensors([file], {"matrix": Tensor(0, kind, SHAPE)})
        held = tensors.dense("matrix", torch.float32)
        packed = expand(tensors.packed("matrix", weights))
    return float((packed - held).norm() / held.norm())


def markdown() -> str:
    """The table of errors in percent."""
    lines = [f"{HEAD} {' | '.join(f'`{weights}`' for weights in PACKED)} |", "|---" * (len(PACKED) + 1) + "|"]
    for file_format in FILE_FORMATS:
        errors = (error(file_format, weights) for weights in PACKED)
        cells = ("kept" if not seen else f"{100 * seen:.1f} %" for seen in errors)
        lines.append(f"| {file_format} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it to the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.repacking", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(markdown())  # noqa: T201
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
    PAGE.write_text(before + markdown() + "\n" + rest.partition("\n\n")[2], encoding="utf-8")


if __name__ == "__main__":
    main()
