"""The boards this project knows: their figures, where each is from, and how a machine is recognised as one.

A file in boards/ holds a family. Its table [shared] is laid under every [[boards]] entry; the tables
gpu and sources are joined key by key. Sizes are written as "8GiB". Each figure names its source or
the file is refused.
"""

import datetime
import difflib
import functools
from pathlib import Path
from typing import Any

import msgspec

from edge_profiles.errors import ProfileError
from edge_profiles.profile import Gpu, Profile
from edge_profiles.sizes import GIB, parse_size

FOLDER = Path(__file__).with_name("boards")
ASSUMED_DISK_FREE_BYTES = 32 * GIB  # a board says nothing of its disk


class BoardGpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The GPU of a board."""

    name: str  # as NVML reports it, so that a card can be recognised
    compute_capability: str
    memory_bytes: int | None = None  # its own memory; None: it works in RAM
    reserved_bytes: int = 0  # of its own memory, held by driver and desktop before a trainer starts


class Board(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A board, or a graphics card in an ordinary host, by its published figures."""

    name: str
    title: str
    machine: str
    memory_bytes: int  # RAM in total; for a graphics card that of an assumed host (see `sources`)
    reserved_bytes: int  # of the RAM, held by firmware, system and desktop before a trainer starts
    cpu_cores: int
    unified_memory: bool  # the GPU works in RAM
    sources: dict[str, str]  # the origin of each figure, by field; a field of the GPU: gpu_<field>
    checked: datetime.date  # when the figures were last compared with their sources, or with copies
    gpu: BoardGpu | None = None
    # peak in 10**9 bytes a second of the memory that training uses: a card's own, else RAM
    memory_bandwidth_gb_s: float | None = None
    # published peak of bf16 matrix products with fp32 sums, without sparsity
    bf16_dense_tflops: float | None = None
    device_tree: tuple[str, ...] = ()  # words in the device tree's model that tell this family


def boards() -> dict[str, Board]:
    """Return every known board by name.

    Raises:
        ProfileError: a board file is not as it should be.
    """
    return dict(_load(FOLDER))


def board(name: str) -> Board:
    """Return the board of this name, such as "jetson-orin-nano-8gb".

    Raises:
        ProfileError: no board has this name; the message has the nearest names and the whole list.
    """
    by_name = _load(FOLDER)
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ProfileError(f"board {name!r} is not known: {hint}Known boards: {', '.join(by_name)}")


def profile_of(board: Board) -> Profile:
    """Return the profile a process would find on this board beside its system and desktop alone.

    Swap is 0 and 32 GiB of disk are free, because neither belongs to the board. RAM is the board's full
    size; `probe` on the board sees a little less: firmware takes a part before the kernel counts.
    """
    available = board.memory_bytes - board.reserved_bytes
    gpu = None
    if board.gpu is not None:
        total, free = board.memory_bytes, available
        if board.gpu.memory_bytes is not None:
            total, free = board.gpu.memory_bytes, board.gpu.memory_bytes - board.gpu.reserved_bytes
        gpu = Gpu(board.gpu.name, board.gpu.compute_capability, total, free)
    return Profile(
        board=board.name,
        description=board.title,
        os="Linux",
        machine=board.machine,
        cpu_cores=board.cpu_cores,
        ram_total_bytes=board.memory_bytes,
        ram_available_bytes=available,
        swap_total_bytes=0,
        disk_free_bytes=ASSUMED_DISK_FREE_BYTES,
        unified_memory=board.unified_memory,
        gpu=gpu,
    )


def recognise_model(model: str, ram_bytes: int) -> Board | None:
    """Return the board that the device tree's model names and whose RAM fits the kernel's total."""
    model = model.lower()
    family = [b for b in _load(FOLDER).values() if any(word.lower() in model for word in b.device_tree)]
    # firmware takes up to a fifth of the RAM before the kernel counts
    return _fitting({b.memory_bytes: b for b in family}, ram_bytes, least=0.6)


def recognise_gpu(name: str, memory_bytes: int) -> Board | None:
    """Return the card of this name ("Laptop GPU" is another) whose memory fits the driver's total."""
    cards = [(b.gpu, b) for b in _load(FOLDER).values() if b.gpu is not None and b.gpu.name == name]
    return _fitting({gpu.memory_bytes: b for gpu, b in cards if gpu.memory_bytes}, memory_bytes, least=0.9)


def _fitting(by_size: dict[int, Board], measured_bytes: int, least: float) -> Board | None:
    """The smallest board of at least the measured size; None if that is below `least` of it."""
    size = min((size for size in by_size if size >= measured_bytes), default=None)
    return by_size[size] if size is not None and measured_bytes >= least * size else None


# --- board files


class _File(msgspec.Struct, forbid_unknown_fields=True):
    boards: list[dict[str, Any]]
    shared: dict[str, Any] = {}


@functools.cache
def _load(folder: Path) -> dict[str, Board]:
    by_name: dict[str, Board] = {}
    for file in sorted(folder.glob("*.toml")):
        for entry in _read(file):
            if entry.name in by_name:
                raise ProfileError(f"{file.name}: board {entry.name!r} is defined twice; rename one")
            by_name[entry.name] = entry
    return by_name


def _read(file: Path) -> list[Board]:
    name = "?"
    try:
        content = msgspec.toml.decode(file.read_bytes(), type=_File)
        result = []
        for fields in content.boards:
            name = str(fields.get("name", "?"))
            entry = {**content.shared, **fields}
            for key in ("gpu", "sources"):
                if key in entry:
                    entry[key] = {**content.shared.get(key, {}), **fields.get(key, {})}
            for table in (entry, entry.get("gpu", {})):
                for key in ("memory_bytes", "reserved_bytes"):
                    if isinstance(table.get(key), str):
                        table[key] = parse_size(table[key])
            result.append(_checked(msgspec.convert(entry, Board)))
        return result
    except (OSError, ValueError, TypeError) as error:  # msgspec's errors and ours are ValueErrors
        raise ProfileError(
            f"{file.name}: board {name!r}: {error}; device_profiles/README.md has the fields"
        ) from error


def _checked(board: Board) -> Board:
    """Refuse figures without a source, sources without a figure, memory that does not add up."""
    figures = {"memory_bytes", "reserved_bytes", "cpu_cores"}
    figures |= {
        name for name in ("memory_bandwidth_gb_s", "bf16_dense_tflops") if getattr(board, name) is not None
    }
    if board.gpu is not None:
        figures |= {"gpu_compute_capability"}
        figures |= {"gpu_memory_bytes", "gpu_reserved_bytes"} if board.gpu.memory_bytes is not None else set()
        if (board.gpu.memory_bytes is None) != board.unified_memory:
            raise ProfileError("a GPU has either memory_bytes of its own or a board with unified_memory")
        if board.gpu.reserved_bytes > (board.gpu.memory_bytes or 0):
            raise ProfileError("the GPU's reserved_bytes exceed its own memory_bytes")
    elif board.unified_memory:
        raise ProfileError("unified_memory needs a gpu")
    if missing := sorted(name for name in figures if not board.sources.get(name, "").strip()):
        raise ProfileError(f"no source for {', '.join(missing)}")
    if extra := sorted(board.sources.keys() - figures):
        raise ProfileError(f"a source for {', '.join(extra)}, which the board does not state")
    if not 0 <= board.reserved_bytes < board.memory_bytes:
        raise ProfileError(
            f"reserved_bytes {board.reserved_bytes} leave nothing of memory_bytes {board.memory_bytes}"
        )
    return board
