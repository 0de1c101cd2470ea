"""silero-vad over WebSocket: how many real-time streams, 99 % of their results within 250 ms?

320 ms a message, the client on the same cores. Counts rise until one fails; the one below is tried again
before it counts, so that a lucky run is not the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from scripts.bench import audio_streams
from scripts.bench.audio_streams import MESSAGE_S, Follow, Followed, follow
from scripts.bench.report import Report, least, say
from scripts.bench.server import Server

WITHIN_SHARE = 0.99
COUNTS = (100, 200, 300, 400, 450, 500, 550, 600, 700, 800)


def run(*, is_short: bool) -> Report:
    counts, duration_s, warm_up_s = ((20,), 5.0, 2.0) if is_short else (COUNTS, 25.0, 5.0)
    config = audio_streams.application()
    tried: list[dict[str, Any]] = []
    with Server(config) as server:

        def passes(count: int) -> bool:
            found = follow(Follow(server.port, count, duration_s, warm_up_s))
            tried.append({"streams": count, **asdict(found)})
            say(f"  {tried[-1]}")
            return _is_good(found)

        streams = largest(counts, passes)
    return Report(
        "vadws",
        {"streams": streams, "tried": tried},
        [least("streams", 400)],
        {
            "application": config["args"],
            "message_s": MESSAGE_S,
            "within_ms": 250,
            "share": WITHIN_SHARE,
            "duration_s": duration_s,
        },
        is_short,
    )


def _is_good(found: Followed) -> bool:
    return found.in_time_share >= WITHIN_SHARE and not found.closed


def largest(counts: Sequence[int], passes: Callable[[int], bool]) -> int:
    """The largest of ascending counts that passes twice, with all below it; 0 where none does."""
    good = []
    for count in counts:
        if not passes(count):
            break
        good.append(count)
    while good and not passes(good[-1]):
        good.pop()
    return good[-1] if good else 0
