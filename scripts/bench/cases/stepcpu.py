"""CPU outside the model in a decode step of 16 rows: scheduling, sampling, text, HTTP, HAProxy, Ray.

All threads of all server processes are read from /proc. The replica's busiest, one a core, run the
model; the rest is outside of it, and so is what the model thread spends on sampling (`/chat/stats`).
What the same processes use while nobody asks (Ray's controller, agents and log readers) is measured before
and after the load and is no step's: `idle_cores`. `outside_share` is what is left, over the step's wall
time; with two cores a step has twice as much CPU, so that is the stricter reading.
"""

import os
import threading
import time
from statistics import median
from typing import Any

from scripts.bench import chat
from scripts.bench.processes import Threads
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server
from scripts.bench.streams import Ask, listen

OUTPUT_TOKENS = 4_000
"""More than any window lasts: the clients leave."""


def run(*, is_short: bool) -> Report:
    windows, window_s = (1, 3.0) if is_short else (5, 6.0)
    config = chat.application()
    settle_s = 4.0 if is_short else 10.0
    rounds: list[dict[str, Any]] = []
    with Server(config) as server:
        time.sleep(window_s)  # start-up's last work
        idle = [_idle_cores(server, window_s)]
        load = threading.Thread(target=_load, args=(server.port, settle_s + windows * (window_s + 0.5)))
        load.start()
        time.sleep(settle_s)  # the client's start and the prompts
        for _ in range(windows):
            rounds.append(_window(server, window_s))
            say(f"  {rounds[-1]}")
        load.join()
        time.sleep(window_s)  # the clients' end
        idle.append(_idle_cores(server, window_s))
    idle_cores = sum(idle) / len(idle)
    for one in rounds:
        one["outside_share"] = round(one["outside_share_with_idle"] - idle_cores, 5)
        one["outside_ms"] = round(one["outside_share"] * one["step_ms"], 4)
    figures = {
        name: round(median(one[name] for one in rounds), 5)
        for name in ("outside_share", "outside_share_with_idle", "outside_ms", "step_ms", "rows")
    }
    return Report(
        "stepcpu",
        figures | {"idle_cores": round(idle_cores, 4), "rounds": rounds},
        [most("outside_share", 0.08)],
        {"application": config["args"], "streams": chat.SLOTS, "window_s": window_s},
        is_short,
    )


def _load(port: int, duration_s: float) -> None:
    listen(
        port,
        [
            Ask(chat.PATH, chat.Job(chat.tokens(64, seed), OUTPUT_TOKENS).body(), leave_s=duration_s)
            for seed in range(chat.SLOTS)
        ],
    )


def _idle_cores(server: Server, window_s: float) -> float:
    """Cores that all processes use while nobody asks."""
    threads, began = Threads(server.tree), time.monotonic()
    time.sleep(window_s)
    return sum(threads.cpu_s().values()) / (time.monotonic() - began)


def _window(server: Server, window_s: float) -> dict[str, Any]:
    threads = Threads(server.tree)
    before, began = chat.EngineStats.read(server), time.monotonic()
    time.sleep(window_s)
    used_s, wall_s = threads.cpu_s(), time.monotonic() - began
    done = chat.EngineStats.read(server).since(before)
    replicas = sorted(
        (s for (name, _), s in used_s.items() if name.startswith("ray::ServeRep")), reverse=True
    )
    model_s = sum(replicas[: len(os.sched_getaffinity(0))])
    # Scheduling and sending are the event loop's, and so counted; sampling is the model thread's.
    outside_s = sum(used_s.values()) - model_s + done.step_s["sample"]
    return {
        "outside_share_with_idle": round(outside_s / wall_s, 5),
        "step_ms": round(1e3 * wall_s / done.steps, 3),
        "rows": round(done.units / done.steps, 2),
        "ms_a_step": {name: round(1e3 * s / done.steps, 4) for name, s in done.step_s.items()},
        "cpu_s_by_process": _by_process(used_s),
    }


def _by_process(used_s: dict[tuple[str, int], float]) -> dict[str, float]:
    names: dict[str, float] = {}
    for (name, _), seconds in used_s.items():
        names[name] = round(names.get(name, 0.0) + seconds, 3)
    return {name: seconds for name, seconds in names.items() if seconds}
