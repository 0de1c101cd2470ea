"""Output tokens/s of SmolLM2 with 8-bit weights over HTTP, against transformers' continuous batching.

As `tokens` with its 24 requests, application and peers, and `optimise: [int8]` in the application's args.
"""

from scripts.bench import chat
from scripts.bench.cases import tokens
from scripts.bench.report import Report, least


def run(*, is_short: bool) -> Report:
    config = chat.application(optimise=["int8"])
    return tokens.measure("tokens8", config, [least("ratio.transformers", 4.0)], is_short=is_short)
