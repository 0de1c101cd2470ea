"""A /vad socket that is open while /embed is scaled three times: HAProxy reloads at each.

`slow`: five minutes, more than HAProxy's own `hard-stop-after` of 120 s would let an old worker live. The
scaling is the config deployed again with another num_replicas. Every result must come.
"""

import threading
import time
from dataclasses import asdict
from typing import Any

from scripts.bench import audio_streams
from scripts.bench.audio_streams import Follow, Followed, follow
from scripts.bench.report import Report, least, most, say
from scripts.bench.server import Server, application

REPLICAS = (2, 1, 2)


def run(*, is_short: bool) -> Report:
    duration_s = 40.0 if is_short else 300.0
    vad, embed = audio_streams.application(), application("embed", "deployments.models.minilm:MiniLM")
    followed: list[Followed] = []
    scaled: list[dict[str, Any]] = []
    with Server(vad, embed) as server:
        plan = Follow(server.port, 1, duration_s, warm_up_s=0.0)
        thread = threading.Thread(target=lambda: followed.append(follow(plan)))
        thread.start()
        began = time.monotonic()
        for number, replicas in enumerate(REPLICAS):
            time.sleep(max(0.0, began + duration_s * (1 + number) / 8 - time.monotonic()))
            scaled.append({"at_s": round(time.monotonic() - began, 1), "replicas": replicas})
            server.scale("embed", replicas)
            scaled[-1]["done_s"] = round(time.monotonic() - began, 1)
            say(f"  {scaled[-1]}")
        thread.join()
    found = followed[0]
    say(f"  {found}")
    return Report(
        "vadsocket",
        {
            "came_share": round(found.came / found.due, 5),
            "closed": len(found.closed),
            "socket": asdict(found),
            "scaled": scaled,
        },
        [least("came_share", 1.0), most("closed", 0)],
        {"applications": [vad["args"], embed["args"]], "duration_s": duration_s, "slow": True},
        is_short,
    )
