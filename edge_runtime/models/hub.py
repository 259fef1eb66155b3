"""Fetches a model from Hugging Face's hub into the hub's own cache.

    owner/name[@revision]              a folder in Hugging Face's layout
    owner/name/FILE.gguf[@revision]    a GGUF file; of a model that is split over files, the first

In the cache each is below models--owner--name/snapshots/COMMIT.
"""

from pathlib import Path

from edge_runtime.errors import InputError
from edge_runtime.models import checkpoint, gguf_header

# configuration and tokenizer
COMPANIONS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
NAMED = 10  # files that a sentence names


def is_id(source: str) -> bool:
    """Whether a catalog's source may be on the hub; no other source has this form but a relative path."""
    name = source.partition("@")[0]
    inner = name.count("/") - 1
    return not source.startswith((".", "/", "~")) and (inner >= 1 if name.endswith(".gguf") else inner == 0)


def id_of(path: Path) -> str | None:
    """The hub's id of a folder or file in the cache, with its commit; None: the path is no such place."""
    for folder in (path, *path.parents):
        kind, _, name = folder.parent.parent.name.partition("--")
        if (kind, folder.parent.name) == ("models", "snapshots"):
            inner = path.relative_to(folder).parts
            return f"{'/'.join([name.replace('--', '/', 1), *inner])}@{folder.name}"
    return None


def fetch(source: str) -> Path:
    """The folder or file of a source of which `is_id` is true, in the cache.

    Raises:
        InputError: the repository has no such file, or has GGUF files alone and the source names none.
        HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError: as huggingface_hub does.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    owner, repository, *inner = name.split("/")
    repository, file = f"{owner}/{repository}", "/".join(inner)
    shard = gguf_header.SHARD.fullmatch(file)
    of_file = [f"{shard[1]}-*-of-{shard[3]}.gguf" if shard else file]
    patterns = of_file if file else [checkpoint.WHOLE, *COMPANIONS]
    folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    if file:
        if not (folder / file).exists():
            raise InputError(f"the hub's {repository} has no file {file}; {_others(repository, folder.name)}")
        return folder / file
    # the same files as are read (checkpoint.py), of the same commit
    if not (folder / checkpoint.WHOLE).exists():
        shards = checkpoint.shards(folder) if (folder / checkpoint.INDEX).exists() else ["*.safetensors"]
        snapshot_download(repository, revision=folder.name, allow_patterns=shards)
        if not any(folder.glob("*.safetensors")):
            raise InputError(
                f"the hub's {repository} has no .safetensors file at its top; {_others(repository, folder.name)}"
            )
    return folder


def _others(repository: str, commit: str) -> str:
    """Which GGUF files of a repository can be named."""
    from huggingface_hub import HfApi

    names = HfApi().list_repo_files(repository, revision=commit)
    shards = {name: gguf_header.SHARD.fullmatch(name) for name in names if name.endswith(".gguf")}
    models = sorted(name for name, shard in shards.items() if shard is None or int(shard[2]) == 1)
    if not models:
        return "nor has it a GGUF file: give a repository in Hugging Face's layout"
    listed = ", ".join(models[:NAMED]) + (f" and {len(models) - NAMED} more" if len(models) > NAMED else "")
    return f"name one of its GGUF files, as {repository}/{models[0]}; it has {listed}"
