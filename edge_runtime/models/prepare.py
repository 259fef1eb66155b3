"""Makes a catalog's source ready on this device: finds or fetches it, and writes down its facts.

    python -m edge_runtime.models.prepare SOURCE --models DIR --cache DIR [--random-weights]

The command prints the facts as JSON. It is a process of its own, because reading a configuration
needs torch and transformers, which the resident agent must not import.

    CACHE/NAME-DIGEST-DIGEST/    configuration, tokenizer, facts.json
                                 tensors.json: how each tensor of the model is read

The weights stay where they are. Their digest, the first, alone makes the model class. The second is
that of the other files and of the versions that wrote the folder: another version writes anew.
"""

import argparse
import hashlib
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from edge_broker.files import put

from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models import checkpoint, gguf_header, hub, quantised
from edge_runtime.models import facts as facts_
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.state import once

# of facts.json and tensors.json; raised when this program would write other ones for the same source
FORMAT = 2
# what they do is written down, each in its own way in each version
WRITERS = ("edge-runtime", "transformers", "tokenizers", "gguf")


def prepare(source: str, models: Path, cache: Path, *, random_weights: bool = False) -> Facts:
    """Find the source, and write its facts to the cache unless they are there.

    Args:
        source: a folder in Hugging Face's layout, a GGUF file, or a hub id (hub.py).
        models: where relative paths are looked for.
        cache: where configurations, tokenizers and facts are kept.
        random_weights: for measuring a shape without its weights. The source is a folder of which
            config.json alone is read; weights are drawn at random, and the tokenizer knows no word.

    Raises:
        InputError: there is no such source, it cannot be read, or its family is not supported.
    """
    path = _find(source, models)
    if path.is_dir() and not random_weights:
        quantised.require_known(path)  # before gigabytes of weights are digested
    companions = sorted(file for pattern in hub.COMPANIONS for file in path.glob(pattern))
    if not random_weights:
        weights = gguf_header.shards(path) if path.is_file() else checkpoint.weight_files(path)
    elif path.is_file():
        raise InputError(f"{path} has weights of its own: random ones need a folder with a config.json")
    else:
        weights = companions = [path / "config.json"]
    name, revision = _name_of(source, models), digest(weights, cache)[:12]
    written_by = f"{digest(companions, cache)} {random_weights} {FORMAT} {_versions()}"
    ready = cache / f"{name}-{revision}-{hashlib.sha256(written_by.encode()).hexdigest()[:12]}"
    # several agents of one machine may share the cache
    once(ready, lambda fresh: _write(path, fresh, f"{name}@{revision}", random_weights))
    facts = msgspec.json.decode((ready / "facts.json").read_bytes(), type=Facts)
    tokenizer = ready / "tokenizer.json"
    return msgspec.structs.replace(
        facts,
        folder=str(ready),  # cache and weights may have moved since the facts were written
        weights="" if random_weights else str(path),
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.exists() else 0,
    )


def _find(source: str, models: Path) -> Path:
    """The folder or GGUF file of a source; a hub id is downloaded into the hub's own cache."""
    for path in (Path(source).expanduser(), models / source):
        if path.is_file():
            if path.suffix != ".gguf":
                raise InputError(f"{path} is no GGUF file: a model is a .gguf file, a folder or a hub id")
            return path.absolute()  # a link's name says more than the file's that it leads to
        if path.is_dir():
            if not (path / "config.json").exists():
                raise InputError(f"{path} has no config.json: a model folder needs Hugging Face's layout")
            return path.resolve()
    if not hub.is_id(source):
        raise InputError(
            f"there is no model at {source}, nor in {models}: copy it there or name a hub id (owner/name, or "
            "owner/name/FILE.gguf)"
        )
    return _fetched(source, models)


def _fetched(source: str, models: Path) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hub.fetch(source)
    # ValueError: the source is no hub id
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"there is no model at {source}, nor in {models}, and it cannot be fetched from the hub either: "
            f"{_reason(error).rstrip('.')}; copy the model to this device, or check its id and the network, and set HF_TOKEN "
            "if the hub asks who you are"
        ) from error


def _name_of(source: str, models: Path) -> str:
    """A name for people, from the catalog's source alone.

    A link on this device may lead to a private name, which must not travel with the model class.
    The hub's cache keeps owner/name in models--owner--name/snapshots/COMMIT.
    """
    is_local = Path(source).expanduser().exists() or (models / source).exists()
    path = Path(source if is_local else source.partition("@")[0])
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rsplit("--", 1)[-1]
    if path.suffix == ".gguf":
        shard = gguf_header.SHARD.fullmatch(path.name)
        return shard[1] if shard else path.stem
    return path.name or "model"


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


def _versions() -> list[str]:
    """The versions of the writers, empty for a package that is not installed."""
    found = []
    for package in WRITERS:
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return found


@lean_imports()
def _write(path: Path, folder: Path, model_class: str, random_weights: bool) -> None:
    """Write configuration, tokenizer, facts and the index of a GGUF file to a new folder."""
    from edge_runtime.models import (
        configuration,
        gguf_config,
        gguf_file,
        gguf_tokenizer,
        headers,
        sizes,
        structure,
    )

    contents = gguf_header.read(path) if path.is_file() else None
    if contents:
        config = gguf_config.configuration(contents)
        tokenizer = gguf_tokenizer.tokenizer(contents, config.vocab_size)
    else:
        # refuses a file that is cut short
        files = set() if random_weights else {*headers.files(path).values()}
        sizes.require(
            path, _stated(path), [place for file in files for place in headers.tensors(file).values()]
        )
        whole, tokenizer = _read(path, random_weights)
        config = configuration.text_part(path, whole)
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    del tokenizer  # a large vocabulary takes more memory than all that follows
    model = _model(path, config)
    blocks = structure.blocks(model)
    if contents:
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        shapes = {name: tuple(held.shape) for name, held in model.state_dict().items() if name not in tied}
        index = gguf_file.index(contents, shapes, config)
        (folder / "tensors.json").write_bytes(msgspec.json.encode(index))
    elif not random_weights:
        from edge_runtime.models import safetensors_index

        found = safetensors_index.index(path, whole, model)
        (folder / "tensors.json").write_bytes(msgspec.json.encode(found))
    config.save_pretrained(folder)
    linears = structure.widths(blocks[0], structure.family(model))
    path_of_blocks = structure.path(model, blocks)
    facts = facts_.read(config, linears, path_of_blocks, model_class=model_class, folder="", weights="")
    (folder / "facts.json").write_bytes(msgspec.json.encode(facts))


def _stated(path: Path) -> dict[str, Any]:
    """What a folder's config.json says."""
    from transformers import PreTrainedConfig

    try:
        stated: dict[str, Any] = PreTrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:
        raise InputError(f"the model at {path} cannot be read: {_reason(error)}") from error
    if not isinstance(stated.get("quantization_config") or {}, dict):
        raise InputError(
            f"the model at {path} cannot be read: quantization_config in its config.json is no object with a "
            "quant_method"
        )
    return stated


def _model(path: Path, config: Any) -> Any:
    """The model of a configuration without memory, after a check that our operators fit it."""
    from edge_kernels import apply

    from edge_runtime.compat.empty_model import empty_model
    from edge_runtime.models import structure

    try:
        model = empty_model(config).requires_grad_(False)
        apply(model, structure.modules(model))
    # transformers raises many kinds for a configuration that contradicts itself
    except Exception as error:
        raise InputError(f"the model at {path} cannot be made: {_reason(error)}") from error
    return model


def _read(path: Path, random_weights: bool) -> tuple[Any, Any]:
    """Configuration and tokenizer of a folder, as transformers reads them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = (
            _words() if random_weights else AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        )
    # transformers raises many kinds here; each means the same to the user
    except Exception as error:
        reason = _reason(error)
        if "trust_remote_code" in reason:
            reason = (
                "it brings code of its own (auto_map), and Edge Runtime runs no code that comes with a model; use "
                "a checkpoint of a type that transformers knows by itself"
            )
        raise InputError(f"the model at {path} cannot be read: {reason}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"the model at {path} is a {config.model_type}, which transformers cannot have write text"
        )
    family_of(config.model_type)
    return config, tokenizer


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _words() -> Any:
    """A tokenizer that splits text at spaces and has one id for all words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<end>")


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
    # a full disk, or another process that does not end
    except OSError as error:
        sys.stderr.write(f"{options.source} cannot be prepared in {options.cache}: {error}\n")
        return InputError.exit_code
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
