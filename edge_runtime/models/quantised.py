"""Matrices that a folder holds in 8 bits with scales, by config.json's quantization_config.

    weight = code * scale * factor        a scale for the matrix, for each row, or for each block

Each method has its dtype and its names; other methods are refused. Sources: transformers'
integrations of FP8 and bitsandbytes. Where blocks do not divide a matrix, the last ones are smaller,
as in the kernels for which such checkpoints are made.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from edge_runtime.errors import InputError
from edge_runtime.models.headers import Place

FP8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F64", "F32", "F16", "BF16")
SCALES = (*FLOATS, "F8_E8M0")
ORDER = "weight_format"  # 0 where codes of int8 are in the order of the matrix
Size = Annotated[int, msgspec.Meta(ge=1)]
Block = tuple[Size, Size]  # rows and columns that share a scale
BLOCK = (128, 128)  # where a configuration of FP8 names no block


class FolderTensor(msgspec.Struct, frozen=True):
    """One tensor of a folder, under the model's name for it."""

    name: str  # in the files
    scales: str = ""  # name of the tensor of its scales; empty: the values are the weights
    block: tuple[int, int] = (1, 1)  # rows and columns that share a scale
    factor: float = 1.0  # of each scale


class Scheme(NamedTuple):
    """How a method of quantisation keeps a matrix NAME.weight."""

    codes: tuple[str, ...] = FP8  # dtypes
    scales: tuple[str, ...] = ("weight_scale_inv", "weight_scale")  # NAME.SCALES; they multiply
    factor: float = 1.0
    # of activations and caches, which stay in floats here
    unused: tuple[str, ...] = ("activation_scale", "input_scale", "input_scale_ub", "k_scale", "v_scale")


SCHEMES = {
    "fp8": Scheme(),
    "fbgemm_fp8": Scheme(),
    "bitsandbytes in 8 bits": Scheme(("I8",), ("SCB",), 1 / 127, (ORDER,)),
}


class Quantisation(NamedTuple):
    """A folder's method, with its settings."""

    scheme: Scheme
    block: Block | None  # None: no block has scales of its own


def require_known(folder: Path) -> None:
    """Refuse a folder of a method that is not read, by its config.json alone; raises as `quantisation` does."""
    try:
        stated = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # no quantisation, or a file that is refused where all of it is read
    if isinstance(stated, dict):
        quantisation(folder, stated)


def quantisation(folder: Path, stated: Mapping[str, Any] | None) -> Quantisation | None:
    """What a quantization_config says; None: the weights are floats.

    Raises:
        InputError: the method is not known, or its blocks have no size. The message names them.
    """
    if not stated:
        return None
    name = str(stated.get("quant_method", "without a quant_method"))
    for bits in (4, 8):
        if stated.get(f"load_in_{bits}bit"):
            name = f"bitsandbytes in {bits} bits"
    if name not in SCHEMES:
        raise InputError(
            f"the weights in {folder} are quantised with {name} (quantization_config in config.json), which is "
            f"not read; known: {', '.join(SCHEMES)}; give the checkpoint in floats, or a GGUF file"
        )
    block = stated.get("weight_block_size", BLOCK)
    try:
        return Quantisation(SCHEMES[name], msgspec.convert(block, Block | None))
    except msgspec.ValidationError as error:
        raise InputError(
            f"quantization_config in {folder}/config.json sets weight_block_size to {block}, but needs rows and "
            "columns of a block, each 1 or more, or null"
        ) from error


def located(name: str, places: Mapping[str, Place], quantised: Quantisation | None) -> FolderTensor:
    """How to read a tensor of a folder.

    Raises:
        InputError: the tensor is neither in floats nor in codes with scales.
    """
    place, stem = places[name], name.rpartition(".")[0]
    if quantised and name == f"{stem}.weight":
        for scales in quantised.scheme.scales:
            if (scale := f"{stem}.{scales}") in places:
                return _scaled(name, scale, places, quantised)
    # values in 8-bit floats are weights where nothing speaks of scales
    if place.dtype in FLOATS or (quantised is None and place.dtype in FP8):
        return FolderTensor(name)
    raise InputError(
        f"{name} is held in {place.dtype} without scales that quantization_config in config.json explains, but "
        f"needs floats ({', '.join(FLOATS)}): give the checkpoint in floats, or a GGUF file"
    )


def without_weights(name: str, quantised: Quantisation | None) -> bool:
    """Whether a tensor of this name belongs to the method and is neither a matrix nor its scales."""
    last = name.rpartition(".")[2]
    return quantised is not None and last in quantised.scheme.unused


def _scaled(name: str, scale: str, places: Mapping[str, Place], quantised: Quantisation) -> FolderTensor:
    place, scales = places[name], places[scale]
    if place.dtype not in quantised.scheme.codes or scales.dtype not in SCALES or len(place.shape) != 2:
        raise InputError(
            f"{name} is {place.dtype} {place.shape} and {scale} is {scales.dtype}, but a matrix of "
            f"{' or '.join(quantised.scheme.codes)} with scales in floats is needed"
        )
    rows, columns = place.shape
    grid = quantised.block and tuple(map(_blocks, place.shape, quantised.block))
    if math.prod(scales.shape) == 1:
        block = (rows, columns)
    elif scales.shape in ((rows,), (rows, 1)):
        block = (1, columns)
    elif quantised.block and scales.shape == grid:
        block = quantised.block
    else:
        blocks = f", or {grid} for blocks of {quantised.block}" if grid else ""
        raise InputError(
            f"{scale} is {scales.shape}, but {name} of {place.shape} needs one scale, one a row{blocks}"
        )
    return FolderTensor(name, scale, block, quantised.scheme.factor)


def _blocks(values: int, block: int) -> int:
    return math.ceil(values / block)
