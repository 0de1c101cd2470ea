"""One bad item fails alone: 2 % of the items make any batch that holds them raise."""

from scripts.bench.endpoint import ours
from scripts.bench.loads import poisoned
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server, application

BATCH = 16


def run(*, is_short: bool) -> Report:
    config = application(
        "poison",
        "scripts.bench.models:PoisonSleep",
        model_args={"base_ms": 20.0, "item_ms": 1.0},
        max_batch_size=BATCH,
    )
    with Server(config) as server:
        figures = poisoned(server.port, ours("poison"), requests=400 if is_short else 4000)
        stats = server.stats("poison")
    figures["mean_batch_items"] = round(stats["recent"]["batch_items_mean"], 2)
    say(f"  {figures}")
    targets = [most("innocents_failed", 0)]
    return Report("poison", figures, targets, {"application": config["args"], "connections": 32}, is_short)
