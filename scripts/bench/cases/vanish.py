"""1,000 clients that connect, stream and vanish at random points: is anything left of them?

700 ask /chat for a stream, 300 send audio to /vad; each drops its connection 0 to 3 s later, in whatever
state: before the first byte, in prefill, in decode, in the middle of a message. Nothing says goodbye. KV
memory is small, the prefix cache full, and some hundred clients have come and gone before them: oneDNN
keeps a kernel for each number of rows it has met (1,024 at most), which looks like a leak until most have
been.
"""

import random
import threading
import time
from collections import Counter
from typing import Any

from scripts.bench import audio_streams, chat
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server
from scripts.bench.streams import Ask, Heard, listen

PARTS, WARM_UPS = 5, 4
TEXTS, SOCKETS = 700, 300
PER_S = 8.0
LONGEST_STAY_S = 3.0
KV_BYTES = 300 * 2**20
"""6,500 tokens."""
FILLERS, FILLER_TOKENS = 40, 200
REPLICA = "ray::ServeRepli"
"""What Linux keeps of a replica's name."""
LONGEST = 96
"""Of prompts and outputs: most texts begin before their client leaves."""


def run(*, is_short: bool) -> Report:
    share = 0.1 if is_short else 1.0
    config, vad = chat.application(kv_bytes=KV_BYTES), audio_streams.application()
    heard: list[Heard] = []
    answered, own_mib = 0, []
    with Server(config, vad) as server:
        for heard_first in listen(server.port, _fillers()):
            assert heard_first.tokens, heard_first.error
        idle = _left(server)
        for part in range(WARM_UPS):
            listen(server.port, _asks(round(share * TEXTS / PARTS), seed=100 + part))
            say(f"  warm-up {part + 1}/{WARM_UPS}: {_own_mib(server)} MiB")
        for part in range(PARTS):
            sockets: list[int] = []
            thread = threading.Thread(
                target=lambda number=part, counts=sockets: counts.append(
                    audio_streams.vanish(server.port, round(share * SOCKETS / PARTS), seed=number)
                )
            )
            thread.start()
            heard += listen(server.port, _asks(round(share * TEXTS / PARTS), seed=part))
            thread.join()
            answered += sockets[0]
            time.sleep(1.0)
            # Not resident memory: a page that processes share would be counted once for each of them.
            own_mib.append(_own_mib(server))
            say(f"  part {part + 1}/{PARTS}: {_left(server)}, replicas {own_mib[-1]} MiB")
        left = _left(server)
        after = listen(server.port, [Ask(chat.PATH, chat.mix(1, seed=1)[0].body())])[0]
    figures: dict[str, Any] = {
        "left": left,
        "left_in_all": sum(left.values()) - sum(idle.values()),
        "idle_before": idle,
        "own_mib_after_each_part": own_mib,
        "own_growth": round(own_mib[-1] / own_mib[0] - 1.0, 4),
        "texts": len(heard),
        "texts_that_had_begun": sum(bool(one.times_s) for one in heard),
        "by_status": dict(Counter(str(one.status) for one in heard)),
        "sockets_that_had_results": answered,
        "later_failed": int(bool(after.error) or not after.text),
    }
    return Report(
        "vanish",
        figures,
        [most("left_in_all", 0), most("own_growth", 0.02), most("later_failed", 0)],
        {"applications": [config["args"], vad["args"]], "clients": round(share * (TEXTS + SOCKETS))},
        is_short,
    )


def _own_mib(server: Server) -> float:
    return round(server.tree.anonymous_bytes(REPLICA) / 2**20, 1)


def _fillers() -> list[Ask]:
    jobs = (chat.Job(chat.tokens(FILLER_TOKENS, 7_000 + number), 1) for number in range(FILLERS))
    return [Ask(chat.PATH, job.body()) for job in jobs]


def _asks(count: int, seed: int) -> list[Ask]:
    source = random.Random(seed)
    jobs = chat.mix(count, seed=seed, longest=LONGEST)
    return [
        Ask(chat.PATH, job.body(), number / PER_S, source.uniform(0.0, LONGEST_STAY_S))
        for number, job in enumerate(jobs)
    ]


def _left(server: Server) -> dict[str, int]:
    """What the replicas hold: sequences, blocks, requests, asyncio tasks."""
    found: dict[str, int] = {}
    for app in ("chat", "vad"):
        stats = chat.EngineStats.read(server, app)
        found |= {
            f"{app}_running": stats.running,
            f"{app}_waiting": stats.waiting,
            f"{app}_blocks": stats.blocks_held,
            f"{app}_in_flight": stats.in_flight,
            f"{app}_tasks": stats.tasks,
        }
    return found
