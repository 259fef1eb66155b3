"""The limits a container or a service sets on memory and CPU, read from the cgroup of this process.

    v2   /proc/self/cgroup "0::/a/b"          memory.max, memory.high   memory.current          cpu.max
    v1   /proc/self/cgroup "4:memory:/a/b"    memory.limit_in_bytes     memory.usage_in_bytes   cpu.cfs_quota_us

Above memory.high the kernel does not end a process but stalls it, so that limit counts like
memory.max. Limits on swap are not read, because a budget counts no swap. Nor is v1's soft limit,
which binds only while the machine is short of memory.

Every level from the process's own folder up to the mount counts, for a parent's limit binds its
children. Inside a container the path is often the host's and not to be seen; then the mount itself
holds the limit. A file that is missing or reads "max" sets no limit. Page cache that the kernel would
drop (inactive_file) does not count as used. The most ever held is in memory.peak (v1:
memory.max_usage_in_bytes).
Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def limit_memory(total_bytes: int, available_bytes: int, root: Path = Path("/")) -> tuple[int, int]:
    """Lower the machine's total and available RAM to what the cgroup of this process leaves.

    Args:
        total_bytes: RAM of the machine.
        available_bytes: of it available by the kernel's estimate.
        root: where /proc and /sys are found.

    Returns:
        Total and available bytes; unchanged where no limit is set.
    """
    for folder in _folders(root, "memory"):
        limits = [_number(folder / f"memory.{name}") for name in ("max", "high")]
        limit = min((number for number in limits if number is not None), default=None)
        used, cache = "memory.current", "inactive_file"
        if limit is None:
            limit = _number(folder / "memory.limit_in_bytes")
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        if limit is not None:
            left = limit - max((_number(folder / used) or 0) - _statistic(folder / "memory.stat", cache), 0)
            total_bytes, available_bytes = (min(total_bytes, limit), min(available_bytes, max(left, 0)))
    return total_bytes, available_bytes


def peak_memory(root: Path = Path("/")) -> int | None:
    """Return the most bytes that the nearest cgroup with a count has ever held; None without one.

    With page cache, and with all its processes; Linux has memory.peak since 5.19.
    """
    for folder in _folders(root, "memory"):
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if (peak := _number(folder / name)) is not None:
                return peak
    return None


def limit_cores(cores: int, root: Path = Path("/")) -> int:
    """Lower a number of CPU cores to the quota of the cgroup of this process, rounded up, at least 1."""
    for folder in _folders(root, "cpu"):
        v1 = f"{text(folder / 'cpu.cfs_quota_us')} {text(folder / 'cpu.cfs_period_us')}"
        fields = (text(folder / "cpu.max") or v1).split()  # microseconds of CPU time, and of a period
        if len(fields) == 2 and all(field.isdecimal() and int(field) for field in fields):
            quota, period = map(int, fields)
            cores = min(cores, -(-quota // period))
    return max(cores, 1)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders that may hold this controller's files, in every hierarchy from the process's folder to the mount."""
    mounts = root / "sys/fs/cgroup"
    for line in text(root / "proc/self/cgroup").splitlines():
        _, _, after_number = line.partition(":")
        controllers, _, path = after_number.partition(":")
        if not controllers:
            mount = mounts
        elif controller in controllers.split(","):
            mount = mounts / controllers if (mounts / controllers).is_dir() else mounts / controller
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        if ".." not in inside.parts:  # so the kernel writes a cgroup outside our namespace
            yield from (mount / level for level in (inside, *inside.parents) if level.parts)
        yield mount


def _statistic(file: Path, name: str) -> int:
    for line in text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return 0


def _number(file: Path) -> int | None:
    number = text(file).strip()
    return int(number) if number.isdecimal() else None  # "max" and v1's -1 both mean no limit


def text(file: Path) -> str:
    """Read a small file of the kernel; empty where there is none."""
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""
