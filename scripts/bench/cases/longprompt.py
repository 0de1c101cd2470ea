"""A prompt of 1,500 tokens arrives among 8 running streams: how long are they silent?

Their longest gap until its first token is out, against their median gap of the 5 s before. `ratio_without` is
the longest gap of those 5 s: what the machine does by itself.
"""

from statistics import median
from typing import Any

from scripts.bench import chat
from scripts.bench.gaps import longest_gap_s, median_gap_s
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server
from scripts.bench.streams import Ask, Heard, listen

PROMPT, BEFORE_S = 1500, 5.0
EVERY_S, AFTER_S, REST_S = 30.0, 10.0, 3.0
"""A round: streams begin, AFTER_S later the prompt arrives; REST_S before the next all have left."""
BEGINNINGS = ("cat", "sailor", "king", "baker", "robot", "teacher", "river", "gardener")
"""Of stories. Text from random tokens is full of halves of characters, and a token without a character is
a gap for the client that no step made."""
STREAMS = len(BEGINNINGS)
NO_SPECIAL = {str(token): -100 for token in range(17)}
"""logit_bias against SmolLM2's special tokens, which have no text either."""


def run(*, is_short: bool) -> Report:
    prompts = 1 if is_short else 6
    config = chat.application()
    with Server(config) as server:
        listen(server.port, [Ask(chat.PATH, chat.Job(chat.tokens(PROMPT, 99), 4).body())])
        heard = listen(server.port, [ask for number in range(prompts) for ask in _asks(number)])
    rounds = []
    for number in range(prompts):
        *streams, late = heard[number * (STREAMS + 1) : (number + 1) * (STREAMS + 1)]
        rounds.append(_round(streams, late))
        say(f"  {rounds[-1]}")
    figures: dict[str, Any] = {
        "ratio": round(median(one["ratio"] for one in rounds), 3),
        "worst_ratio": max(one["ratio"] for one in rounds),
        "ratio_without": round(median(one["ratio_without"] for one in rounds), 3),
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


def _asks(number: int) -> list[Ask]:
    """The streams of a round, then its prompt: another one each, so that none is in the prefix cache."""
    began_s = number * EVERY_S
    prompt = chat.Job(chat.tokens(PROMPT, 100 + number), 4).body()
    stories = [
        chat.Job((), 1_500).body(
            prompt=f"Part {number}. Once upon a time there was a {who} who", logit_bias=NO_SPECIAL
        )
        for who in BEGINNINGS
    ]
    return [Ask(chat.PATH, body, began_s, EVERY_S - REST_S) for body in stories] + [
        Ask(chat.PATH, prompt, began_s + AFTER_S)
    ]


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
