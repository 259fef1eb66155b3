"""Makes a catalog's source ready on this device: finds or fetches it, and writes down its facts.

    python -m edge_runtime.models.prepare SOURCE --models DIR --cache DIR [--random-weights]     prints the facts as JSON

A process of its own, because reading a configuration needs torch and transformers, which the resident agent must not
import. What it finds is kept under the cache by the checkpoint's digest: configuration, tokenizer, facts.json and, for a
GGUF file, where each tensor lies (tensors.json). Weights stay where they are, and they alone make the model class.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from edge_broker.files import put
from filelock import FileLock

from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models import facts as facts_
from edge_runtime.models.facts import Facts

LOCK_TIMEOUT_S = 600.0
FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")  # of a model folder


def prepare(source: str, models: Path, cache: Path, *, random_weights: bool = False) -> Facts:
    """Find the source, and write its facts to the cache unless they are there.

    Args:
        source: a folder in Hugging Face's layout, a GGUF file, or a hub id "owner/name[@revision]".
        models: where relative paths are looked for.
        cache: where configurations, tokenizers and facts are kept.
        random_weights: the source is a folder of which config.json alone is read; its model is drawn at random, and its
            tokenizer knows no more than words apart. For measuring a shape one has no weights of.

    Raises:
        InputError: there is no such source, it cannot be read, or its architecture is not one we know.
    """
    path = find(source, models)
    weights, others = ([path], []) if path.is_file() else _files(path)
    if random_weights:
        if path.is_file():
            raise InputError(f"{path} has weights of its own: random ones need a folder with a config.json")
        weights, others = [path / "config.json"], []
    if not weights:
        raise InputError(
            f"{path} has no .safetensors file: give a folder in Hugging Face's layout or a GGUF file"
        )
    name, revision = _name(source, models), _digest(weights, cache)[:12]
    kind = ["random"] if random_weights else [_digest(others, cache)[:12]] if others else []
    ready = cache / "-".join([name, revision, *kind])
    with FileLock(
        ready.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S
    ):  # several agents of one machine may share the cache
        if not ready.exists():
            from edge_runtime.trainer.lean import lean_imports

            with (
                tempfile.TemporaryDirectory(dir=cache) as scratch,
                lean_imports(),
            ):  # a family's code comes late
                _write(path, Path(scratch) / ready.name, ready, f"{name}@{revision}", random_weights)
                put(Path(scratch) / ready.name, ready)
    facts = msgspec.json.decode((ready / "facts.json").read_bytes(), type=Facts)
    tokenizer = ready / "tokenizer.json"
    return msgspec.structs.replace(
        facts,
        folder=str(ready),  # the cache may have moved since, and so may the file
        weights="" if random_weights else str(path),
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.exists() else 0,
    )


def find(source: str, models: Path) -> Path:
    """The folder or GGUF file a source means; a hub id is downloaded into Hugging Face's own cache."""
    for path in (Path(source).expanduser(), models / source):
        if path.is_file():
            if path.suffix != ".gguf":
                raise InputError(f"{path} is no GGUF file: a model is a .gguf file, a folder or a hub id")
            return path.resolve()
        if path.is_dir():
            if not (path / "config.json").exists():
                raise InputError(f"{path} has no config.json: a model folder needs Hugging Face's layout")
            return path.resolve()
    a_path = source.startswith((".", "/", "~")) or source.endswith(".gguf")
    if a_path or source.count("/") != 1:
        raise InputError(
            f"there is no model at {source}, nor in {models}: copy it there or name a hub id (owner/name)"
        )
    return _download(source, models)


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The weights of a model folder, and what else it is read from."""
    patterns = [pattern for pattern in FILES if pattern != "*.safetensors"]
    return sorted(folder.glob("*.safetensors")), sorted(file for one in patterns for file in folder.glob(one))


def _name(source: str, models: Path) -> str:
    """A name for people, from the catalog's source alone: a link on this device may lead to a private name.

    The hub's cache keeps owner/name in models--owner--name/snapshots/COMMIT.
    """
    local = Path(source).expanduser().exists() or (models / source).exists()
    path = Path(source if local else source.partition("@")[0])
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rsplit("--", 1)[-1]
    return (path.stem if path.suffix == ".gguf" else path.name) or "model"


def _download(source: str, models: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: no hub id
        reason = " ".join(str(error).split()).rstrip(".")  # the hub's reasons go over several lines
        raise InputError(
            f"there is no model at {source}, nor in {models}, and it cannot be fetched from the hub either: {reason}; copy it "
            "there instead"
        ) from error


def _write(path: Path, work: Path, ready: Path, model_class: str, random_weights: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    from edge_runtime.models import families as roles
    from edge_runtime.models import gguf_file, weights, whole

    for file in [path] if path.is_file() else [] if random_weights else whole.files(path):
        whole.tensors(file)
    where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    if not where:
        _refuse_remote_code(folder)
    try:
        with gguf_file.plain_reader():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **where)
            tokenizer = (
                _words()
                if random_weights
                else AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
            )
    except Exception as error:  # transformers raises many kinds here; each means the same to the user
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the model at {path} cannot be read: {reason}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"the model at {path} is a {config.model_type}, which transformers cannot have write text"
        )
    work.mkdir()
    config.save_pretrained(work)
    tokenizer.save_pretrained(work)
    del tokenizer
    model = weights.empty(config)
    blocks = roles.blocks(model)
    if not blocks:
        raise InputError(
            f"the model at {path} has 0 layers, but needs 1 or more: its config.json may be damaged"
        )
    block = blocks[0]
    linears = {role: roles.widths(block.get_submodule(inner)) for role, inner in roles.linears(block).items()}
    if path.is_file():
        names = [
            name
            for name in model.state_dict()
            if not (config.tie_word_embeddings and name == "lm_head.weight")
        ]
        (work / "tensors.json").write_bytes(msgspec.json.encode(gguf_file.index(path, names, config)))
    facts = facts_.read(config, linears, model_class=model_class, folder=str(ready), weights=str(path))
    (work / "facts.json").write_bytes(msgspec.json.encode(facts))


def _words() -> Any:
    """A tokenizer that takes words apart at spaces and knows none of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<end>")


def _refuse_remote_code(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if config.get("auto_map"):
        raise InputError(
            f"the model in {folder} brings code of its own (auto_map in config.json), and Edge Runtime runs no code that "
            "comes with a model; use a checkpoint that transformers knows by itself"
        )


def _digest(files: list[Path], cache: Path) -> str:
    """SHA-256 over files, remembered by path, size and time of change: hashing gigabytes takes seconds."""
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memo = cache / "digests" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    if memo.exists():
        return memo.read_text()
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    memo.parent.mkdir(parents=True, exist_ok=True)
    fresh = memo.with_suffix(f".{os.getpid()}")
    fresh.write_text(digest.hexdigest())
    put(fresh, memo)
    return digest.hexdigest()


def main() -> int:
    """Print the facts of a source, or one sentence that says why it cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m edge_runtime.models.prepare")
    parser.add_argument("source")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--random-weights", action="store_true")
    options = parser.parse_args()
    try:
        facts = prepare(options.source, options.models, options.cache, random_weights=options.random_weights)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
