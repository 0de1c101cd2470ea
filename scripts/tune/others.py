"""How much of the CPUs other programs used while we measured.

Owns: reading that from Linux. Must not know: what was measured. Looks in turns let a constant load hit all
alike; one that comes and goes makes every figure less sure.
"""

import os
import time
from pathlib import Path

MUCH = 0.15
"""Of the CPUs: with more than this, people should know."""


class Others:
    """From its making until `notes`, which is asked when our own processes have ended."""

    def __init__(self) -> None:
        self._began_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s()

    def notes(self) -> list[str]:
        """A sentence where it was much."""
        cpus, wall_s = os.cpu_count() or 1, time.monotonic() - self._began_s
        others_s = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        share = others_s / (cpus * max(wall_s, 1e-3))
        if share < MUCH:
            return []
        return [
            f"other programs used {100 * share:.0f} % of the CPUs meanwhile; a quiet machine would be surer"
        ]


def _busy_s() -> float:
    """Of all CPUs since the machine started; 0 where there is no /proc/stat."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Of this process and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
