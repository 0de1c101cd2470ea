"""A prompt of 1,500 tokens arrives among 8 running streams: how long are they silent?

Their longest gap until its first token is out, against their median gap of the 5 s before. Each prompt is
another one: none is in the prefix cache.
"""

from statistics import median
from typing import Any

from scripts.bench import chat
from scripts.bench.gaps import longest_gap_s, median_gap_s
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server
from scripts.bench.streams import Ask, Heard, listen

STREAMS, PROMPT, BEFORE_S = 8, 1500, 5.0
EVERY_S = 30.0
"""Between prompts: the one is answered and 5 s are quiet before the next."""
FIRST_S = 10.0


def run(*, is_short: bool) -> Report:
    prompts = 1 if is_short else 6
    config = chat.application()
    last_s = FIRST_S + prompts * EVERY_S
    asks = [
        Ask(chat.PATH, chat.Job(chat.tokens(32, seed), 6000).body(), leave_s=last_s)
        for seed in range(STREAMS)
    ] + [
        Ask(chat.PATH, chat.Job(chat.tokens(PROMPT, 100 + number), 4).body(), FIRST_S + number * EVERY_S)
        for number in range(prompts)
    ]
    with Server(config) as server:
        listen(server.port, [Ask(chat.PATH, chat.Job(chat.tokens(PROMPT, 99), 4).body())])
        heard = listen(server.port, asks)
    rounds = [_round(heard[:STREAMS], late) for late in heard[STREAMS:]]
    for one in rounds:
        say(f"  {one}")
    figures: dict[str, Any] = {
        "ratio": round(median(one["ratio"] for one in rounds), 3),
        "worst_ratio": max(one["ratio"] for one in rounds),
        "first_token_s": round(median(one["first_token_s"] for one in rounds), 3),
        "rounds": rounds,
    }
    return Report(
        "longprompt",
        figures,
        [most("ratio", 3.0)],
        {"application": config["args"], "streams": STREAMS, "prompt_tokens": PROMPT, "before_s": BEFORE_S},
        is_short,
    )


def _round(streams: list[Heard], late: Heard) -> dict[str, float]:
    times_s = [stream.times_s for stream in streams]
    usual_s = median_gap_s(times_s, late.sent_s - BEFORE_S, late.sent_s)
    longest_s = longest_gap_s(times_s, late.sent_s, late.sent_s + late.first_s)
    # What the machine does by itself: the same streams with no prompt among them.
    longest_before_s = longest_gap_s(times_s, late.sent_s - BEFORE_S, late.sent_s)
    return {
        "usual_gap_ms": round(1e3 * usual_s, 2),
        "longest_gap_ms": round(1e3 * longest_s, 2),
        "ratio": round(longest_s / usual_s, 3),
        "ratio_without": round(longest_before_s / usual_s, 3),
        "first_token_s": round(late.first_s, 3),
    }
