"""Finds the model that a catalog's source names, and tells models apart by digest.

A source is a folder in Hugging Face's layout, a GGUF file, or a hub id "owner/name[@revision]".
"""

import hashlib
import json
import os
from pathlib import Path

from edge_broker.files import put

from edge_runtime.errors import InputError

WEIGHTS = "*.safetensors"
# configuration and tokenizer
COMPANIONS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")


def find(source: str, models: Path) -> Path:
    """The folder or GGUF file that a source means; a hub id is downloaded into the hub's own cache.

    Raises:
        InputError: there is no such model, or it is no GGUF file and no folder with a config.json.
    """
    for path in (Path(source).expanduser(), models / source):
        if path.is_file():
            if path.suffix != ".gguf":
                raise InputError(f"{path} is no GGUF file: a model is a .gguf file, a folder or a hub id")
            return path.resolve()
        if path.is_dir():
            if not (path / "config.json").exists():
                raise InputError(f"{path} has no config.json: a model folder needs Hugging Face's layout")
            return path.resolve()
    is_path = source.startswith((".", "/", "~")) or source.endswith(".gguf")
    if is_path or source.count("/") != 1:
        raise InputError(
            f"there is no model at {source}, nor in {models}: copy it there or name a hub id (owner/name)"
        )
    return _download(source, models)


def _download(source: str, models: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    try:
        patterns = [WEIGHTS, *COMPANIONS]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    # ValueError: the source is no hub id
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")  # the hub's reasons go over several lines
        raise InputError(
            f"there is no model at {source}, nor in {models}, and it cannot be fetched from the hub either: "
            f"{reason}; copy it there instead"
        ) from error


def name_of(source: str, models: Path) -> str:
    """A name for people, from the catalog's source alone.

    A link on this device may lead to a private name, which must not travel with the model class.
    The hub's cache keeps owner/name in models--owner--name/snapshots/COMMIT.
    """
    is_local = Path(source).expanduser().exists() or (models / source).exists()
    path = Path(source if is_local else source.partition("@")[0])
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rsplit("--", 1)[-1]
    return (path.stem if path.suffix == ".gguf" else path.name) or "model"


def digest(files: list[Path], cache: Path) -> str:
    """The SHA-256 of files, which is remembered by their paths, sizes and times of change."""
    # hashing gigabytes takes seconds
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memo = cache / "digests" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    if memo.exists():
        return memo.read_text()
    content = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                content.update(piece)
    memo.parent.mkdir(parents=True, exist_ok=True)
    fresh = memo.with_suffix(f".{os.getpid()}")
    fresh.write_text(content.hexdigest())
    put(fresh, memo)
    return content.hexdigest()
