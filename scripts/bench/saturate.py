"""Requests/s of a closed loop: `wrk` where it is installed, else our own client.

Owns: both ways to keep N connections busy with a list of bodies. wrk (C, one thread) costs about
0.03 ms of CPU a request, our client 0.1 to 0.2: on a machine shared with the server that matters
from some hundred requests/s on.
"""

import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.arrivals import after, latency_ms
from scripts.bench.client import Plan, Shot, request, run_load

# Bodies come from a file of "<length>\n<bytes>" entries and are rendered once; each request is then
# a table look-up.
_LUA = """
local rendered, at = {}, 0
function init(args)
  local file = io.open(args[1], "rb")
  while true do
    local length = file:read("*n")
    if not length then break end
    file:read(1)
    rendered[#rendered + 1] = wrk.format("POST", wrk.path, {["Content-Type"] = args[2]}, file:read(length))
  end
  file:close()
end
function request()
  at = at % #rendered + 1
  return rendered[at]
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\nJSON{"requests":%d,"us":%d,"failed":%d,"p50":%.1f,"p99":%.1f}\\n',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""

WARM_UP_S = 1.0
"""Of each slice of `steady`: until batches have found their rhythm."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """Requests/s of good answers, their latency, and how many were not good."""

    rate: float
    p50_ms: float
    p99_ms: float
    failed: int


def saturate(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    duration_s: float,
    content_type: str = "application/json",
) -> Saturation:
    """Keep `connections` busy with `bodies`, round and round. Warm up with a call of its own."""
    if shutil.which("wrk") is None:
        return _own(port, path, bodies, connections, duration_s, content_type)
    return _wrk(port, path, bodies, connections, duration_s, content_type)


def steady(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    duration_s: float,
    content_type: str = "application/json",
) -> Saturation:
    """The same for slices of seconds and tens of answers a second: `rate` is from burst to burst.

    Answers come in bursts of a batch, so counting over a fixed time is off by up to a batch. Our
    own client: it knows when each answer came, and costs nothing at such rates.
    """
    shots = [Shot(request(path, body, content_type=content_type)) for body in bodies]
    load = run_load(Plan(port, shots, connections, WARM_UP_S + duration_s))
    good = [sample for sample in load.samples if sample.status == 200]
    ends_s = sorted(sample.at_s + sample.latency_s for sample in good)
    rate = burst_rate([end_s for end_s in ends_s if end_s >= WARM_UP_S], duration_s)
    failed = len(load.samples) - len(good)
    return Saturation(rate, latency_ms(good, 0.5), latency_ms(good, 0.99), failed)


def burst_rate(ends_s: Sequence[float], window_s: float) -> float:
    """Answers/s between the end of the first burst and the end of the last; ascending times in.

    Without two bursts: answers over the whole window.
    """
    if len(ends_s) < 3:
        return len(ends_s) / window_s
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(ends_s)]
    # Half of the third largest: a stall or two must not hide the gaps between batches.
    limit_s = sorted(gaps_s)[-min(3, len(gaps_s))] / 2
    marks = [i for i, gap_s in enumerate(gaps_s) if gap_s >= limit_s]
    first, last = marks[0], marks[-1]
    if ends_s[last] - ends_s[first] < window_s / 3:
        return len(ends_s) / window_s
    return (last - first) / (ends_s[last] - ends_s[first])


def client_name() -> str:
    return "own client" if shutil.which("wrk") is None else "wrk"


def _wrk(
    port: int, path: str, bodies: Sequence[bytes], connections: int, duration_s: float, content_type: str
) -> Saturation:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        script, corpus = Path(folder) / "bodies.lua", Path(folder) / "bodies"
        script.write_text(_LUA)
        corpus.write_bytes(b"".join(b"%d\n%s" % (len(body), body) for body in bodies))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(duration_s))}s", "--timeout", "30s"]
        command += ["-s", str(script), f"http://127.0.0.1:{port}{path}", "--", str(corpus), content_type]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.rsplit("JSON", 1)[1])
    good = found["requests"] - found["failed"]
    return Saturation(
        good / (found["us"] / 1e6), found["p50"] / 1e3, found["p99"] / 1e3, int(found["failed"])
    )


def _own(
    port: int, path: str, bodies: Sequence[bytes], connections: int, duration_s: float, content_type: str
) -> Saturation:
    shots = [Shot(request(path, body, content_type=content_type)) for body in bodies]
    load = run_load(Plan(port, shots, connections, duration_s))
    good = [sample for sample in load.samples if sample.status == 200]
    failed = len(load.samples) - len(good)
    # wrk stops its clock at the time, and drops what is still under way; so does this.
    in_time = [sample for sample in good if sample.at_s + sample.latency_s <= duration_s]
    kept = after(in_time, 0.0)
    return Saturation(len(kept) / duration_s, latency_ms(kept, 0.5), latency_ms(kept, 0.99), failed)
