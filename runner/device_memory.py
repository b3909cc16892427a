"""How many bytes a run may take: as text says, or as the device has them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from runner.errors import ParameterError

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
_CPU_SHARE = 0.8
"""Of what is free: the rest is for Python, the rows that wait, and whoever else needs some."""
_GPU_SHARE = 0.9


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes from a number or a text such as 8GiB or 500MB.

    Raises:
        ParameterError: it is something else, or less than a byte; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(value).strip().lower())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        allowed = "bytes, or a number with a unit such as 8GiB or 500MB"
        raise ParameterError(f"{name}={value!r} is not allowed: {allowed}")
    return int(float(found[1]) * unit)


def default_memory_budget() -> int:
    """What the device has for this process, weights that are loaded already included.

    On Metal a share of the working set that the system recommends; on CUDA and a CPU what mlx
    holds now and a share of what is free.
    """
    info = mx.device_info() if mx.default_device() == mx.gpu else {}
    if recommended := info.get("max_recommended_working_set_size"):
        return int(_GPU_SHARE * int(recommended))
    held = mx.get_active_memory() + mx.get_cache_memory()
    if free := info.get("free_memory"):
        return held + int(_GPU_SHARE * int(free))
    return held + int(_CPU_SHARE * available_memory())


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that are free or can be freed, within the limits of control groups."""
    return max(0, min([_available_on_host(root), *_available_in_groups(root)]))


def _available_on_host(root: Path) -> int:
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available_in_groups(root: Path) -> Iterator[int]:
    """What each control group that this process is in, and each above it, leaves."""
    try:
        lines = _read(root / "proc/self/cgroup").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            version_1 = controllers == "memory"
            mount = root / "sys/fs/cgroup" / ("memory" if version_1 else "")
            place = mount / path.strip("/")
            while place.is_relative_to(mount):
                yield from _available_in_group(place, version_1=version_1)
                place = place.parent


def _available_in_group(group: Path, *, version_1: bool) -> Iterator[int]:
    limit, usage, unused = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version_1
        else ("memory.max", "memory.current", "inactive_file")
    )
    try:
        most, used = int(_read(group / limit)), int(_read(group / usage))
        found = re.search(rf"^{unused} (\d+)", _read(group / "memory.stat"), re.MULTILINE)
    except (OSError, ValueError):  # No such group, or "max": it has no limit.
        return
    yield most - used + (int(found[1]) if found else 0)


def _read(path: Path) -> str:
    return path.read_text()
