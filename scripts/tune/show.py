"""Progress while it runs, the curves and the choice at the end.

Owns: what people see. On a terminal one line is written over and over; elsewhere each is a line of its own.
Must not know: how anything was measured.
"""

import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from scripts.tune.points import Curve

BAR = 32


class Progress:
    """Lines to `stream`; spent_s: seconds since the beginning."""

    def __init__(self, budget_s: float, spent_s: Callable[[], float], stream: TextIO | None = None) -> None:
        self._budget_s, self._spent_s = budget_s, spent_s
        self._stream = sys.stderr if stream is None else stream
        self._is_live = self._stream.isatty()

    def say(self, text: str) -> None:
        spent_s = min(self._spent_s(), self._budget_s)
        line = f"  {spent_s:4.0f} of {self._budget_s:.0f} s  {text}"
        if not self._is_live:
            print(line, file=self._stream, flush=True)
            return
        done = round(10 * spent_s / self._budget_s)
        line = f"  [{'=' * done}{' ' * (10 - done)}] {line.strip()}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[2K{line[:width]}", end="", file=self._stream, flush=True)

    def end(self) -> None:
        """The live line makes place for what follows."""
        if self._is_live:
            print("\r\033[2K", end="", file=self._stream, flush=True)


def curve_lines(curve: Curve, title: str, marked: tuple[Any, Any], unit: str) -> Iterator[str]:
    """A bar a value, of the median look. marked: the chosen value, the config's."""
    if len(curve.rates) < 2:
        return
    medians = {value: statistics.median(rates) for value, rates in curve.rates.items()}
    top = max(medians.values())
    texts = {value: _text(value) for value in medians}
    width = max(len(title), *(len(text) for text in texts.values()))
    yield f"  {title:>{width}}  {unit + '/s':>8}"
    for value, median in medians.items():
        marks = [word for word, of in zip(("chosen", "config"), marked, strict=True) if value == of]
        bar = "#" * max(1, round(BAR * median / top)) if top else ""
        looks = f"{len(curve.rates[value])} look{'s' * (len(curve.rates[value]) > 1)}"
        note = f"  <- {', '.join(marks)}" if marks else ""
        yield f"  {texts[value]:>{width}}  {median:>8.4g}  {bar:<{BAR}}  {looks}{note}"


def _text(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return "the model's own" if value is None else str(value.text())
