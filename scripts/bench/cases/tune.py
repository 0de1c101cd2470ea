"""tune against a full grid: how good is its choice, and in what part of the time?

Three applications: embed and classify of config.yaml, and a user's class from a file outside the repository.
For each, tune first (starting its processes included), then every combination of batch, slots, threads and
replicas for 5 s; last the two choices against each other, in turns, in processes of their own.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.report import ROOT, Report, least, most, say
from scripts.tune.application import read_application
from scripts.tune.crew import Crew
from scripts.tune.grid import Grid
from scripts.tune.others import Others
from scripts.tune.points import Point
from scripts.tune.search import Budget, Search
from scripts.tune.session import Session, Wish
from scripts.tune.tuning import Tuning

APPLICATIONS = ("embed", "classify", "own")
BUDGET_S = 35.0

_OWN = '''import torch


class Scorer:
    """Three layers of 1,024 over 512 features: a matrix that is read once a batch, whatever its size."""

    def load(self, device):
        torch.manual_seed(0)
        sizes = (512, 1024, 1024, 1)
        layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        self.net = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1], torch.nn.GELU(), layers[2])
        self.net.eval().to(device)

    def forward(self, batch):
        return self.net(batch)

    def examples(self):
        return [[0.1] * 512, [0.2] * 512]
'''

_CONFIG = """applications:
  - name: own
    route_prefix: /own
    import_path: serve_app.builder:dynamic
    args: {model: "scorer:Scorer", max_batch_size: 8, safety: shared}
    deployments: [{name: model}]
"""


def run(*, is_short: bool) -> Report:
    found = {name: measure(name, BUDGET_S) for name in (APPLICATIONS[2:] if is_short else APPLICATIONS)}
    return report(found, is_short=is_short)


def report(found: dict[str, Any], *, is_short: bool) -> Report:
    """Of all applications, the worst."""
    figures = {
        "choice_of_best": min(one["choice_of_best"] for one in found.values()),
        "time_of_grid": max(one["time_of_grid"] for one in found.values()),
        "applications": found,
    }
    return Report(
        "tune",
        figures,
        [least("choice_of_best", 0.95), most("time_of_grid", 0.2)],
        {"objective": "throughput"},
        is_short,
    )


def measure(name: str, budget_s: float) -> dict[str, Any]:
    """One application: tune, the grid, the two choices."""
    with tempfile.TemporaryDirectory() as folder:
        config = ROOT / "config.yaml"
        if name == "own":
            config = Path(folder, "config.yaml")
            config.write_text(_CONFIG)
            Path(folder, "scorer.py").write_text(_OWN)
        tuned, tune_s = _tuned(name, config, budget_s, is_grid=False)
        grid, grid_s = _tuned(name, config, budget_s, is_grid=True)
        both = _compared(name, config, tuned.chosen, grid.chosen)
    say(f"  {name}: choice {both} of the grid's best, {tune_s:.0f} s against {grid_s:.0f} s")
    return {
        "choice_of_best": both["times"],
        "between": [both["low"], both["high"]],
        "time_of_grid": round(tune_s / grid_s, 4),
        "budget_s": budget_s,
        "tune_s": round(tune_s, 1),
        "grid_s": round(grid_s, 1),
        "tune": tuned.to_json(),
        "grid": grid.to_json(),
    }


def _tuned(name: str, config: Path, budget_s: float, *, is_grid: bool) -> Any:
    """(its result, the seconds it took)."""
    began = time.monotonic()
    app = read_application(name, config)
    crew, others = Crew(app.job), Others()
    try:
        kind: type[Session] = Grid if is_grid else Tuning
        result = kind(
            app, Wish(with_variants=False), crew, Budget(budget_s), lambda text: say(f"    {text}")
        ).run()
    finally:
        crew.close()
    result.seconds = time.monotonic() - began
    result.notes += others.notes()
    return result, result.seconds


def _compared(name: str, config: Path, tuned: Point, best: Point) -> dict[str, float]:
    """The choice over the grid's, by looks in turns; 1 where they are the same."""
    if tuned == best:
        return {"times": 1.0, "low": 1.0, "high": 1.0}
    app = read_application(name, config)
    crew = Crew(app.job)
    try:
        crew.open([tuned.shape, best.shape], 8)
        search = Search(crew.look, Budget(300.0), say, look_s=1.0)
        for point in (tuned, best):
            search.look(point)  # warm
        sure = search.compare(tuned, best)
    finally:
        crew.close()
    return {"times": round(sure.times, 4), "low": round(sure.low, 4), "high": round(sure.high, 4)}
