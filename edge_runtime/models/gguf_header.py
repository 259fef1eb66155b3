"""The header of a GGUF file: metadata, and where each tensor lies; no weight is read.

    "GGUF" u32 version u64 tensors u64 pairs | pairs | name, shape, kind, offset of each | tensors

A model may be split over files. Each holds some of the tensors, and the first all metadata:

    NAME-00001-of-00003.gguf    split.no 0, split.count 3, split.tensors.count of all three

Sources: docs/gguf.md of ggml; llama.cpp's tools/gguf-split.
"""

import math
import re
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.errors import InputError
from edge_runtime.models.headers import HeaderReader, Place, places

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # struct's forms
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class Contents(NamedTuple):
    """What the headers of one model's files say."""

    files: list[Path]
    metadata: dict[str, Any]  # numbers, truth values, strings, and lists or tuples of them
    tensors: dict[str, Place]


def read(path: Path, *, values: bool = True) -> Contents:
    """The headers of a GGUF file and of the files that it is split over.

    Args:
        path: the model's file, or the first of them.
        values: False: pass over the metadata, which holds a large vocabulary.

    Raises:
        InputError: a file is cut short, damaged, of another version or byte order, or missing; or
            the files do not belong together.
    """
    files = shards(path)
    metadata: dict[str, Any] = {}
    tensors: dict[str, Place] = {}
    for number, file in enumerate(files):
        pairs: dict[str, Any] = {}
        found = places(file, partial(_parse, pairs=pairs, values=values))
        if values:
            _check_split(file, pairs, number, len(files))
        if twice := found.keys() & tensors.keys():
            raise InputError(
                f"{file} and a file before it both have the tensor {min(twice)}: they are not of one model; copy "
                "them again"
            )
        tensors.update({name: place._replace(shard=number) for name, place in found.items()})
        metadata = metadata or pairs
    if len(tensors) != metadata.get("split.tensors.count", len(tensors)):
        raise InputError(
            f"{path} and the files after it hold {len(tensors)} tensors, but should hold "
            f"{metadata['split.tensors.count']} (split.tensors.count): they are not of one model; copy them again"
        )
    return Contents(files, metadata, tensors)


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and end of each pair of a file's metadata, by key; `read` has accepted the file."""
    with path.open("rb") as stream:
        header, pairs = HeaderReader(path, path.stat().st_size, stream), {}
        header.take(struct.calcsize("<4sIQ"))
        for _ in range(header.number("Q")):
            first = stream.tell()
            key, kind = header.take(header.number("Q")).decode(), header.number("I")
            _value(header, kind, keep=False)
            pairs[key] = (first, stream.tell())
    return pairs


def shards(path: Path) -> list[Path]:
    """The files of one model, told from the name of its first one alone.

    Raises:
        InputError: the file is not the first, or others are missing.
    """
    match = SHARD.fullmatch(path.name)
    if not match:
        return [path]
    number, count = int(match[2]), int(match[3])
    files = [path.with_name(f"{match[1]}-{each:05}-of-{count:05}.gguf") for each in range(1, count + 1)]
    if number != 1:
        raise InputError(
            f"{path} is file {number} of {count} of one model: name the first, {match[1]}-00001-of-{match[3]}.gguf"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path} is the first of {count} files of one model, of which these are missing: {', '.join(missing)}; "
            "copy them beside it"
        )
    return files


def _check_split(file: Path, pairs: dict[str, Any], number: int, count: int) -> None:
    stated = pairs.get("split.no", 0) + 1, max(pairs.get("split.count", 1), 1)  # a merged file states 0
    if stated != (number + 1, count):
        raise InputError(
            f"{file} is file {stated[0]} of {stated[1]} by its metadata (split.no, split.count), but file "
            f"{number + 1} of {count} by its name: files of a split model are named NAME-00001-of-00003.gguf"
        )


def _parse(header: HeaderReader, pairs: dict[str, Any], values: bool) -> dict[str, Place]:
    """The file's tensors; with `values` its metadata is added to `pairs`."""
    import gguf  # 2 MiB, which a trainer of safetensors files does without

    if header.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := header.number("I")) not in VERSIONS:
        raise ValueError(
            f"its version is {version}, but has to be one of {VERSIONS}, least significant byte first"
        )
    count, alignment = header.number("Q"), gguf.GGUF_DEFAULT_ALIGNMENT
    for _ in range(header.number("Q")):
        key, kind = header.take(header.number("Q")).decode(), header.number("I")
        value = _value(header, kind, values or key == "general.alignment")
        if key == "general.alignment":
            alignment = value
        if values:
            pairs[key] = value
    if not alignment:
        raise ValueError("its general.alignment is 0")
    blocks = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}  # values and bytes, by kind
    found, behind = {}, 0
    for _ in range(count):
        name, dimensions = header.take(header.number("Q")).decode(), header.number("I")
        if name in found:
            raise ValueError(f"it has the tensor {name} twice")
        if dimensions > 4:
            raise ValueError(f"{name} has {dimensions} dimensions, but GGUF allows 4")
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        kind, first = header.number("I"), header.number("Q")
        if kind not in blocks:
            raise ValueError(f"{name} is of kind {kind}, which the installed gguf package does not know")
        size = math.prod(shape) // blocks[kind][0] * blocks[kind][1]
        # a place or a kind that is wrong would make other numbers of the file's bytes
        if first != behind:
            raise ValueError(f"{name} begins at byte {first} of the tensors, but has to at {behind}")
        behind += -(-size // alignment) * alignment
        found[name] = Place(first, first + size, shape, kind)
    start = -(-header.stream.tell() // alignment) * alignment
    return {
        name: place._replace(first=start + place.first, end=start + place.end)
        for name, place in found.items()
    }


def _value(header: HeaderReader, kind: int, keep: bool) -> Any:
    """The next value, which is passed over unless it is kept."""
    if kind == STRING:
        return _text(header, keep)
    if kind in NUMBERS:
        return header.number(NUMBERS[kind])
    if kind != ARRAY:
        raise ValueError(f"a value in its header is of kind {kind}, which GGUF does not have")
    kind, count = header.number("I"), header.number("Q")
    if kind == STRING:
        texts = (_text(header, keep) for _ in range(count))  # a wrong count ends at the file's end
        return [text for text in texts if keep]
    if kind not in NUMBERS:
        raise ValueError(f"an array in its header has values of kind {kind}, which GGUF does not have there")
    content = header.take(count * struct.calcsize(NUMBERS[kind]), skip=not keep)
    return struct.unpack(f"<{count}{NUMBERS[kind]}", content) if keep else ()


def _text(header: HeaderReader, keep: bool) -> str:
    # a token that is no text in UTF-8 becomes another, which the tokenizer refuses where it is there twice
    return header.take(header.number("Q"), skip=not keep).decode(errors="replace")
