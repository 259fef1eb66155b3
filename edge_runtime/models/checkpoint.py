"""Which files of a folder in Hugging Face's layout are the model, in transformers' order.

    model.safetensors                 the whole model
    model.safetensors.index.json      names the shards of a model that was saved in several files
    NAME.safetensors                  a single file of another name

Other files are not read, such as shards of an earlier save or a copy in another precision.
"""

from pathlib import Path

import msgspec

from edge_runtime.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]  # the file of each tensor


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights.

    Raises:
        InputError: there are none, the index names a file that is not there, or several files are
            there without an index.
    """
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    if (folder / INDEX).exists():
        return [_shard(folder, name) for name in shards(folder)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(_without_safetensors(folder))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(
            f"{folder} has several files of weights and neither {WHOLE} nor {INDEX}, so which of them are the "
            f"model is not known: {names}; name the model's file {WHOLE}, or add its index"
        )
    return files


def shards(folder: Path) -> list[str]:
    """The names of the files in a folder's index, without repetition."""
    listing = folder / INDEX
    try:
        index = msgspec.json.decode(listing.read_bytes(), type=_Index)
    except (OSError, ValueError) as error:
        raise InputError(f"{listing} cannot be read: {error}") from error
    return sorted(set(index.weight_map.values()))


def _shard(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        raise InputError(f"{folder / INDEX} names {name}, which is not in the folder: copy {name} there too")
    return folder / name


def _without_safetensors(folder: Path) -> str:
    others = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern))
    if not others:
        return f"{folder} has no .safetensors file: give a folder in Hugging Face's layout or a GGUF file"
    return (
        f"{folder} has no .safetensors file, and {others[0]} is not read, because such a file may run code: load "
        "the model with transformers, save it with save_pretrained, and give that folder"
    )
