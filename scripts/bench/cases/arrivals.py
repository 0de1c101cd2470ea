"""Poisson arrivals at 0.6 of capacity: mean latency against waiting for whole batches, same kernels.

Capacity is measured just before: 16 connections that always have a request of the mix under way.
"""

from scripts.bench import chat
from scripts.bench.arrivals import poisson
from scripts.bench.client import Plan, Shot, request, run_load
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server
from scripts.bench.whole_batches import compare

SHARE = 0.6


def run(*, is_short: bool) -> Report:
    rounds, duration_s, warm_up_s, longest = (1, 12.0, 2.0, 64) if is_short else (3, 120.0, 15.0, 256)
    config = chat.application()
    with Server(config) as server:
        per_s = _capacity(server.port, longest, count=24 if is_short else 32)
        say(f"  capacity {per_s:.3f} requests/s")

        def shots_of(number: int) -> list[Shot]:
            times_s = poisson(SHARE * per_s, duration_s, seed=20 + number)
            jobs = chat.mix(len(times_s), seed=40 + number, longest=longest)
            return [_shot(job, at_s) for job, at_s in zip(jobs, times_s, strict=True)]

        found = compare(server.port, shots_of, rounds=rounds, batch_size=chat.SLOTS, warm_up_s=warm_up_s)
    return Report(
        "arrivals",
        found | {"capacity_per_s": round(per_s, 3)},
        [most("ratio", 0.5), most("failed", 0)],
        {
            "application": config["args"],
            "rate_per_s": round(SHARE * per_s, 3),
            "tokens": [16, longest],
            "duration_s": duration_s,
        },
        is_short,
    )


def _shot(job: chat.Job, at_s: float = 0.0) -> Shot:
    # The server's own 30 s bound on waiting must not end what a whole batch would have kept waiting.
    headers = "X-Request-Timeout-Ms: 600000\r\n"
    return Shot(request(chat.PATH, job.body(is_streamed=False), headers=headers), at_s)


def _capacity(port: int, longest: int, count: int) -> float:
    """Requests/s between the end of the first and the start of the last: the slots were full then."""
    shots = [_shot(job) for job in chat.mix(count, seed=3, longest=longest)]
    load = run_load(Plan(port, shots, connections=chat.SLOTS))
    if any(sample.status != 200 for sample in load.samples):
        raise RuntimeError("the capacity run had failures")
    full_s = max(sample.at_s for sample in load.samples)
    ended = sum(sample.at_s + sample.latency_s <= full_s for sample in load.samples)
    return ended / full_s
