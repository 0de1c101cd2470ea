"""16 requests at once that share a system prompt of 400 tokens: time to the first token, cache or none.

`warm`: the shared 400 tokens are in the prefix cache. `none`: each request has 400 tokens of its own that
nobody has seen, so the same server finds nothing in its cache. The two take turns.
"""

from statistics import fmean, median

from scripts.bench import chat
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server
from scripts.bench.streams import Ask, listen

REQUESTS, SHARED, OWN, OUTPUT = 16, 400, 32, 16


def run(*, is_short: bool) -> Report:
    rounds = 1 if is_short else 5
    config = chat.application()
    found: list[dict[str, float]] = []
    with Server(config) as server:
        for number in range(-1, rounds):
            warm_up = listen(server.port, [_ask(0, 1000)])  # puts the shared prompt into the cache
            assert not warm_up[0].error, warm_up[0].error
            seeds = range(10_000 + 100 * number, 10_000 + 100 * number + REQUESTS)
            warm_s = _first_s(server.port, [_ask(0, seed) for seed in seeds])
            none_s = _first_s(server.port, [_ask(seed, seed + 50) for seed in seeds])
            if number >= 0:  # the first was to warm up
                found.append(
                    {
                        "warm_s": round(warm_s, 4),
                        "none_s": round(none_s, 4),
                        "ratio": round(warm_s / none_s, 4),
                    }
                )
                say(f"  round {number + 1}/{rounds}: {found[-1]}")
        recent = server.stats("chat").get("recent", {})
    return Report(
        "prefix",
        {
            "ratio": round(median(one["ratio"] for one in found), 4),
            "warm_s": median(one["warm_s"] for one in found),
            "none_s": median(one["none_s"] for one in found),
            "rounds": found,
            "recent": recent,
        },
        [most("ratio", 0.4)],
        {
            "application": config["args"],
            "requests": REQUESTS,
            "shared_tokens": SHARED,
            "own_tokens": OWN,
            "output_tokens": OUTPUT,
        },
        is_short,
    )


def _ask(shared: int, own: int) -> Ask:
    prompt = chat.tokens(SHARED, 1_000_000 + shared) + chat.tokens(OWN, own)
    return Ask(chat.PATH, chat.Job(prompt, OUTPUT).body())


def _first_s(port: int, asks: list[Ask]) -> float:
    return fmean(heard.first_s for heard in listen(port, asks))
