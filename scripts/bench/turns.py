"""Server and ceilings take turns, slice by slice, and only neighbours are compared.

Owns: the order, the ratios, and the watch for strangers on the same cores. Small machines, shared
ones above all, change speed by half within seconds; so slices are short and many, each of the
server's lies between two of the ceiling's, and the median of the ratios is the result.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.processes import TICKS, Tree
from scripts.bench.report import say

STRANGERS_CORES = 0.15
"""A round in which other programs took more than this is left out, if enough rounds remain."""


@dataclass(slots=True)
class Turns:
    """ceiling and the others: a slice each, -> rate. servers are compared with the ceiling."""

    ceiling: Callable[[], float]
    servers: Mapping[str, Callable[[], float]]
    others: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def run(self, rounds: int) -> None:
        for number in range(rounds):
            self.rounds.append(self._round())
            shown = ", ".join(f"{name} {value:.2f}" for name, value in self.rounds[-1].items())
            say(f"  round {number + 1}/{rounds}: {shown}")

    def _round(self) -> dict[str, float]:
        watch = Strangers()
        found = {"ceiling": self.ceiling()}
        ceilings = [found["ceiling"]]
        for name, serve in self.servers.items():
            found[name] = serve()
            ceilings.append(self.ceiling())
            # Harmonic: rates over equal work, as one slice of twice the work would have given.
            found[f"{name}_ratio"] = found[name] * (1 / ceilings[-2] + 1 / ceilings[-1]) / 2
        found["ceiling"] = sum(ceilings) / len(ceilings)
        for name, measure in self.others.items():
            found[name] = measure()
        found["strangers_cores"] = watch.cores()
        return found

    def figures(self, unit: str) -> dict[str, Any]:
        """Medians of rates and ratios, and every round as it was."""
        quiet = [r for r in self.rounds if r["strangers_cores"] <= STRANGERS_CORES]
        kept = quiet if 2 * len(quiet) >= len(self.rounds) else self.rounds

        def middle(name: str, digits: int) -> float:
            return round(median(r[name] for r in kept), digits)

        return {
            unit: {name: middle(name, 1) for name in [*self.servers, "ceiling", *self.others]},
            "ratio": {name: middle(f"{name}_ratio", 4) for name in self.servers},
            "rounds_kept": len(kept),
            "strangers_cores": middle("strangers_cores", 3),
            "rounds": [{name: round(value, 3) for name, value in r.items()} for r in self.rounds],
        }


def against_neighbours(rates: Mapping[str, Sequence[float]], first: str = "ours") -> dict[str, float]:
    """How many times faster `first` was than each other: the median over rounds.

    Measured as A B C A B C A: `first` has one value more, and each round of another is compared with
    the mean of the two beside it (harmonic: rates over equal work).
    """
    own = rates[first]
    ratios = {}
    for name, others in rates.items():
        if name != first:
            ratios[name] = median(2 / (1 / own[i] + 1 / own[i + 1]) / other for i, other in enumerate(others))
    return ratios


class Strangers:
    """Cores taken by programs that are not ours, since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before = self._others_s()

    @staticmethod
    def _others_s() -> float:
        # user nice system idle iowait irq softirq steal, in ticks (proc(5)); steal isn't a program
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        busy_s = (sum(fields[:3]) + sum(fields[5:7])) / TICKS
        return busy_s - sum(Tree(os.getpid()).cpu_s().values())

    def cores(self) -> float:
        return max(0.0, self._others_s() - self._before) / (time.monotonic() - self._began)
