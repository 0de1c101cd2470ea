"""A chosen setting as changes of the config's keys, each with its reason.

Owns: which keys have to be written for a choice. Must not know: how it was found, the file's text.
"""

from collections.abc import Mapping

from scripts.tune.application import Application
from scripts.tune.config_lines import Change
from scripts.tune.points import Point

REASONS = ("batch", "shape", "cost", "variant", "replicas")


def changes_of(app: Application, chosen: Point, reasons: Mapping[str, str]) -> list[Change]:
    """Only what differs from what the config means now. reasons: by the names in REASONS."""
    now, found = app.start, []

    def change(key: str, value: object, why: str, place: str = "args") -> None:
        of = app.args if place == "args" else app.deployment
        was = of
        for part in key.split("."):
            was = (was or {}).get(part) if isinstance(was, Mapping) else None  # type: ignore[assignment]
        reason = reasons.get(why, "")
        found.append(Change(place, key, value, was, f"{key} {_plain(value)}: {reason}".rstrip(": ")))

    if chosen.batch != now.batch:
        change(app.batch_key, chosen.batch, "batch")
    if chosen.cost != now.cost and chosen.cost is not None:
        change(app.cost_key, int(chosen.cost) if chosen.cost == int(chosen.cost) else chosen.cost, "cost")
    if chosen.shape.slots != now.shape.slots:
        change("slots", chosen.shape.slots, "shape")
    slots, threads = chosen.shape.slots, chosen.shape.threads
    if max(1, _total_threads(app) // slots) != threads:  # as the executor shares them out
        change("threads", slots * threads, "shape")
    if chosen.shape.variant != now.shape.variant:
        change("optimise", list(chosen.shape.variant), "variant")
    if chosen.shape.replicas != now.shape.replicas:
        replicas = chosen.shape.replicas
        change("num_replicas", replicas, "replicas", "deployment")
        if app.job.gpus:
            change("ray_actor_options.num_gpus", round(app.job.gpus / replicas, 4), "replicas", "deployment")
    return found


def _total_threads(app: Application) -> int:
    """What the config gives all slots of a process now, whatever their number."""
    asked = app.args.get("threads")
    granted = float((app.deployment.get("ray_actor_options") or {}).get("num_cpus", 0.0))
    return int(asked) if asked else int(granted) if granted >= 1.0 else app.cpus


def _plain(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
