"""docs/benchmarks/README.md out of the JSON results: one row a target, one a peer.

Owns: the words of that page. Pure apart from reading results and writing one file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TITLES = {
    "embed": "MiniLM over HTTP, texts of 8-128 words, one a request",
    "classify": "EfficientNet-Lite0 over HTTP, JPEGs of about 500x375",
    "noop": "A model that does nothing, 32 connections: CPU of all server processes, ms a request",
    "idle": "One connection: p50 above the call in process, ms",
    "latebinding": "A model of 40 + 2n ms, Poisson arrivals: p50, ms",
    "fill": "Mean fill of batches under a backlog",
    "overload": "Twice the capacity, clients that give up after 1 s",
    "poison": "2 % poison, batches of 16: innocents that fail",
    "soak": "10,000 requests, 1 % each poison, cancelled, late",
    "giveup": "2,000 clients give up after 50 ms, then ordinary load",
    "tokens": "SmolLM2-135M fp32, 24 requests at once, 16 slots: output tokens/s against others",
    "quantised": "SmolLM2, int8 against fp32 packed, decode in process: tokens/s of 1 and 16 streams",
    "tokens8": "The same 24 requests over HTTP with `optimise: [int8]`: output tokens/s against others",
    "stepcpu": "CPU outside the model, of a decode step of 16 rows",
    "arrivals": "SmolLM2, Poisson at 0.6 of capacity: mean latency against whole batches",
    "longprompt": "A prompt of 1,500 tokens among 8 streams: longest gap against the usual one",
    "prefix": "16 requests, one system prompt of 400 tokens: time to first token, warm against none",
    "vadsocket": "A /vad socket for 5 minutes while /embed is scaled three times",
    "vadengine": "silero-vad in the engine: real-time streams",
    "vadws": "silero-vad over WebSocket, 99 % of results within 250 ms: real-time streams",
    "denoiser": "Denoiser of 4-50 steps, Poisson 20/s: mean latency against whole batches",
    "variants": "Variants of MiniLM and EfficientNet-Lite0 against plain eager, one process, taking turns",
    "vanish": "1,000 clients connect, stream and vanish",
    "unsafe": "Unsafe models under `safety: auto`, 10,000 concurrent requests: wrong answers",
    "pool": "Four MiniLM instances against one: resident memory",
    "memory": "A memory limit halfway through 5,000 requests of mixed size",
    "tune": "tune's choice against the best of a full grid, and its time (worst of its models)",
}

_HEAD = """# Benchmarks

Written by `python -m scripts.bench table` from `results/*.json`; don't edit. Every result holds its
configuration, git sha (a `+`: the tree had changes), hardware and versions. `make bench` runs all (about
two hours), `brimful bench NAME` one, `--short` a form of seconds that proves nothing.

Absolute figures belong to this machine, whose speed drifts by tens of percent; ratios are between
measurements of one run that took turns. The client runs on the same cores as the server.
"""


def write_table(docs: Path) -> Path:
    """Write README.md into `docs` from the results in it; returns its path."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((docs / "results").glob("*.json"))}
    results = {name: result for name, result in found.items() if "hardware" in result}
    notes = docs / "notes.md"
    path = docs / "README.md"
    path.write_text(render(results, notes.read_text() if notes.exists() else ""))
    return path


def render(results: Mapping[str, Mapping[str, Any]], notes: str = "") -> str:
    """The page as Markdown; benchmarks without a result are named as such."""
    parts = [_HEAD, _machine(results), "## Figures against their targets\n", _targets(results)]
    if any(name.startswith("peer_") for name in results):
        parts += ["## Other servers, same loads\n", _peers(results)]
    if notes:
        parts.append(notes.strip() + "\n")
    return "\n".join(parts)


def _machine(results: Mapping[str, Mapping[str, Any]]) -> str:
    machines = {
        f"{r['hardware']['cores']} cores of {r['hardware']['cpu']}, {r['hardware']['memory_gib']:g} GiB"
        for r in results.values()
    }
    return f"Machine: {'; '.join(sorted(machines)) or 'no results yet'}.\n"


def _targets(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        "| name | benchmark | figure | reach | measured | reached | git sha |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        result = results.get(name)
        if result is None:
            rows.append(f"| {name} | {title} | | | not measured | | |")
            continue
        for figure, text in result["target"].items():
            value = _number(_look_up(result["figures"], figure))
            reached = "yes" if result["reached"][figure] else "**no**"
            first = f"{name} | {title}" if figure == next(iter(result["target"])) else "|"
            rows.append(f"| {first} | `{figure}` | {text} | {value} | {reached} | {result['git_sha']} |")
    rows += ["", *_ceilings(results)]
    return "\n".join(rows) + "\n"


def _ceilings(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    if "embed" in results:
        rates = results["embed"]["figures"]["texts_per_s"]
        lines.append(f"- embed, texts/s: {_pairs(rates)} (`ceiling`: transformers offline on sorted,")
        lines.append("  padded texts; `own_model_alone`: ours, ragged, on unsorted ones).")
    if "classify" in results:
        rates = results["classify"]["figures"]["images_per_s"]
        lines.append(f"- classify, images/s: {_pairs(rates)} (`ceiling`: the pipeline).")
    if "noop" in results:
        figures = results["noop"]["figures"]
        lines.append(
            f"- noop: {figures['noop']['requests_per_s']:.0f} requests/s; an ASGI echo on the same HAProxy"
            f" {figures['echo']['requests_per_s']:.0f}/s at {figures['echo']['cpu_ms_per_request']:.2f} ms."
        )
    if "latebinding" in results:
        figures = results["latebinding"]["figures"]
        plain = {rate: figures[f"serve_batch_{rate}"]["p50_ms"] for rate in (150, 5)}
        lines.append(
            f"- latebinding: `@serve.batch` as documented, same server: p50 {plain[150]:.0f} ms at 150/s,"
            f" {plain[5]:.0f} at 5/s."
        )
    return lines


def _peers(results: Mapping[str, Mapping[str, Any]]) -> str:
    ours = {name: results[name]["figures"] for name in ("embed", "overload", "poison") if name in results}
    rows = [
        "| server | MiniLM texts/s of offline, better of 32 and 64 connections |"
        " overload: answered of capacity, sleep x 2 | at 0.75 | refusals p50 ms |"
        " MiniLM x 2 | innocents failed |",
        "|---|---|---|---|---|---|---|",
    ]
    if len(ours) == 3:
        rows.append(_row("**brimful**", ours["embed"], ours["overload"], ours["poison"]))
    for name, result in results.items():
        if name.startswith("peer_"):
            figures = result["figures"]
            label = f"{result['config']['peer']} {result['config']['peer_version']}"
            rows.append(_row(label, figures["embed"], figures["overload"], figures["poison"]))
    how = (
        "\nEach peer from its own virtual environment (`python -m scripts.bench peers`), with the settings\n"
        "that served it best here (scripts/bench/peers/), the same weights, texts and sleeping model;\n"
        "patience unsaid, since they have no header for it.\n"
    )
    return "\n".join(rows) + "\n" + how


def _row(label: str, embed: Mapping[str, Any], overload: Mapping[str, Any], poison: Mapping[str, Any]) -> str:
    twice, calm = overload["sleep"]["twice_unsaid"], overload["sleep"]["three_quarters_unsaid"]
    refusals = twice["refusals_ms"]["p50"]
    cells = [
        label,
        _number(max(embed["ratio"].values())),
        _number(twice["answered_of_capacity"]),
        _number(calm["answered_of_offered"]),
        _number(refusals) if refusals else "none",
        _number(overload["minilm"]["twice_unsaid"]["answered_of_capacity"]),
        f"{100 * poison['innocents_failed_share']:.1f} %",
    ]
    return f"| {' | '.join(cells)} |"


def _look_up(figures: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        figures = figures[part]
    return figures


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pairs(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
