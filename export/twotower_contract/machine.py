"""Questions to the operating system that not every system answers as Linux does."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """Return how many CPU cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux's
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the memory of this machine, or of the container around us; 0 if nobody says."""
    if not hasattr(os, "sysconf"):
        return 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def available_bytes() -> int:
    """Return the memory that is free or would be freed for a process that asks; 0 if nobody says.

    Pages that only cache files count: the system drops them when memory is asked for.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else 0


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read from a place of a file that one thread alone reads; fewer bytes come at its end only."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, length)
