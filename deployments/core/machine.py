"""What of the machine this process may use: CPUs and memory, within a container's limits.

Owns: how the system is asked. Must not know: what it is used for. Source: Linux, "The /proc filesystem"
(MemAvailable); "Control Group v2" (memory.max).
"""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """CPUs that this process may run on; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def total_bytes() -> int:
    """What the machine has, or the container may use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number_in("memory.max")
    return total if limit is None else min(total, limit)


def free_bytes() -> int:
    """What Linux says is available, within the limit of a container; elsewhere what is free."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
    limit, used = _number_in("memory.max"), _number_in("memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used)
    return max(0, available)


def _number_in(name: str) -> int | None:
    """None where there is no such file, or no limit ("max")."""
    file = _CGROUP / name
    if file.exists() and (text := file.read_text().strip()).isdigit():
        return int(text)
    return None
