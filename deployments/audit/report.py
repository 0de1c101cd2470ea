"""The audit's report as people read it: on a terminal, and as a Markdown page.

Owns: its words: what was found, where, what to change, what it costs to leave it. Must not know: how
anything was decided.
"""

import linecache
from collections.abc import Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]

QUESTIONS = {
    "thread_safe": "do threads that share one instance get what each gets alone?",
    "cold_start_safe": "the same for its very first calls",
    "copy_safe": "do two instances keep out of each other's way?",
    "order_independent": "is an answer independent of earlier calls?",
    "batch_invariant": "is an item's answer independent of its batch-mates?",
    "padding_invariant": "and of how far it is padded?",
    "deterministic": "does it draw no random numbers?",
    "eval_mode": "is everything in evaluation mode?",
}

CURES = {
    "thread_safe": (
        "keep what a call needs in local variables; leave it, and calls run one at a time in each instance "
        "(mode {mode})"
    ),
    "cold_start_safe": (
        "build tables and lazy layers in load(); leave it, and warm-up runs on one thread, as brimful does"
    ),
    "copy_safe": (
        "move module globals, class attributes and lru_caches that change to the instance; leave it, and "
        "parallel calls need a process each"
    ),
    "order_independent": (
        "keep nothing between calls that answers depend on; leave it, and callers see each other's traces, "
        "whatever the mode: one call at a time doesn't cure it"
    ),
    "batch_invariant": (
        "reduce over an item's own dimensions only (not over dim 0), scale per row, drop no tokens; leave "
        "it, and items are run one by one (batching per_item), or say allow_batch_dependence: true"
    ),
    "padding_invariant": (
        "mask what is padded in attention, pooling and convolutions; leave it, and items are run one by one"
    ),
    "deterministic": (
        "call .eval(), or seed a generator made in the call itself; leave it, and equal requests get unequal "
        "answers"
    ),
    "eval_mode": (
        "call .eval() in load() on the whole network, and pass training=self.training to functional dropout"
    ),
}

MODES = {
    "shared": "one instance, several threads",
    "pool": "several instances that share their weights, one call at a time in each",
    "processes": "one call at a time; for more at once, more replicas",
    "exclusive": "one call at a time, in the order they came",
}

_SIGNS = {True: "yes", False: "NO ", None: "  ? "}


def lines(report: Report) -> Iterator[str]:
    """For a terminal."""
    yield f"{report['target']}: {report['verdict']}"
    yield f"  mode {report['mode']}: {MODES[report['mode']]}; batching {report['batching']}"
    yield ""
    for name, found in report["properties"].items():
        yield f"  {_SIGNS[found['holds']]:<4} {name:<18} {found['reason']}"
        if found["holds"] is False and not _is_told_above(name, report):
            yield from (f"       {line}" for line in details(name, report))
    yield ""
    yield from (f"  {line}" for line in measured(report))


def _is_told_above(name: str, report: Report) -> bool:
    """First calls race where any do: the same proof."""
    first, any_call = (report["properties"][one]["evidence"] for one in ("cold_start_safe", "thread_safe"))
    return name == "cold_start_safe" and bool(first == any_call)


def details(name: str, report: Report) -> Iterator[str]:
    """Of a property that fails: the proof, and what to change."""
    for one in report["properties"][name]["evidence"][:3]:
        if "replay" in one:
            for thread, call in one["calls"].items():
                yield f"thread {thread}: {' + '.join(call)}"
            yield f"see it again: --replay {one['replay']}"
        elif "batches" in one:
            first, second = one["batches"]
            yield f"[{', '.join(first)}] against [{', '.join(second)}]: {one['difference']:.2g}"
        elif "module" in one:
            yield f"{one['module']} ({one['type']}): {one['what']}"
        elif "seen" in one:
            yield f"{' + '.join(one['call'])}: " + "; ".join(one["seen"])
        elif "at" in one:
            yield f"{one['at']}: {one.get('what') or one.get('operator')}"
    if name in ("thread_safe", "copy_safe", "order_independent"):
        for write in report["writes"][:4]:
            yield f"written in a call: {write['attribute']} of {write['of']}, {write['file']}:{write['line']}"
    yield "to change: " + CURES[name].format(mode=report["mode"])


def measured(report: Report) -> Iterator[str]:
    """What the modes would gain."""
    found = report["measured"]
    if "error" in found:
        yield f"not measured: {found['error']}"
        return
    instance, item = found["instance_bytes"] / 2**20, found["item_bytes"] / 2**20
    yield f"an instance takes {instance:.0f} MiB, an item {item:.2f} MiB"
    yield f"{found['items_per_s']:g} items/s one by one on {found['cores']} cores"
    gains = ", ".join(
        f"{name.replace('_', ' ')} {ratio:g} times" for name, ratio in found["speed_up"].items()
    )
    yield f"against that: {gains}"
    if "why" in found:
        yield found["why"]
    yield from left_as_it_is(report)


def left_as_it_is(report: Report) -> Iterator[str]:
    """What the mode and the batching cost, where they are not the best."""
    gains = report["measured"]["speed_up"]
    if report["mode"] == "exclusive" and gains["pool_of_2"] > 1:
        yield f"exclusive, one at a time: two instances would give {gains['pool_of_2']:g} times"
    if report["mode"] == "pool":
        yield f"pool: instances take memory for what is not shared; two give {gains['pool_of_2']:g} times"
    if report["mode"] == "processes":
        yield "processes: each replica takes the memory of an instance and of an interpreter (about 300 MiB)"
    batch = next((name for name in gains if name.startswith("batch")), None)
    if report["batching"] == "per_item" and batch and gains[batch] > 1:
        yield f"per_item: a {batch.replace('_', ' ')} would give {gains[batch]:g} times"


def markdown(report: Report) -> str:
    """A page to keep."""
    rows = [
        f"| `{name}` | {QUESTIONS[name]} | {_SIGNS[found['holds']].strip()} | {_cell(found['reason'])} |"
        for name, found in report["properties"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"# {report['target']}: {report['verdict']}",
        f"Mode `{report['mode']}` ({MODES[report['mode']]}), batching `{report['batching']}`. {versions}.",
        "\n".join(["| property | question | holds | why |", "|---|---|---|---|", *rows]),
        *(
            f"## `{name}`\n\n" + "\n".join(f"- {line}" for line in details(name, report))
            for name, found in report["properties"].items()
            if found["holds"] is False and not _is_told_above(name, report)
        ),
        "## Measured\n\n" + "\n".join(f"- {line}" for line in measured(report)),
    ]
    return "\n\n".join(parts) + "\n"


def side_by_side(
    evidence: Mapping[str, Any], found: Mapping[str, Any] | None, columns: int = 100
) -> Iterator[str]:
    """A replayed trial: the threads in columns, time downwards; lines of the model's own code with their
    text, what lies before them as a number. columns: of the terminal."""
    if found is None:
        yield "it did not happen this time"
        return
    names = list(evidence["calls"])
    width = max(30, columns // len(names) - 3)
    yield " | ".join(f"{'thread ' + name:<{width}}" for name in names).rstrip()
    yield " | ".join(f"{' + '.join(evidence['calls'][name])[:width]:<{width}}" for name in names).rstrip()
    yield "-+-".join("-" * width for _ in names)
    for step in found["steps"]:
        for text in _texts(step):
            cells = [_tail(text, width) if n == step["thread"] else "" for n in range(len(names))]
            yield " | ".join(f"{cell:<{width}}" for cell in cells).rstrip()
    yield ""
    yield f"thread {names[found['thread']]} {found['how']}"
    alone, here = found["values"]
    if alone != here:
        yield f"  alone  {alone}"
        yield f"  here   {here}"


def _texts(step: Mapping[str, Any]) -> Iterator[str]:
    """A stretch of one thread: its lines, or where it begins and ends."""
    if not step["lines"]:
        yield step["from"] if step["points"] == 1 else f"{step['from']} .. {step['to']} ({step['points']})"
        return
    if rest := step["points"] - len(step["lines"]):
        yield f"({rest} steps before)"
    for place in step["lines"]:
        file, _, line = place.rpartition(":")
        yield f"{place.rsplit('/', 1)[-1]}  {linecache.getline(file, int(line)).strip()}"


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
