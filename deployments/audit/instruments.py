"""Pause points inside a model's call: before each operator, before each line of the model's own code.

Owns: where a call can be paused. Must not know: who goes on then. Operators see what C++ does to tensors,
lines what Python does to attributes: each finds races that the other can't. Both hold for the calling thread
alone.
Source: torch.utils._python_dispatch; sys.settrace; DESIGN, "The audit".
"""

import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Flag
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Pause = Callable[[str], None]
OnOperator = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]


class Instruments(Flag):
    OPERATORS = 1
    LINES = 2
    BOTH = 3
    OPCODES = 4


@contextmanager
def instrumented(pause: Pause, instruments: Instruments) -> Iterator[None]:
    """`pause(what)` is called at every point of the block, in this thread."""
    before = sys.gettrace()
    if instruments & (Instruments.LINES | Instruments.OPCODES):
        event = "line" if Instruments.LINES in instruments else "opcode"
        sys.settrace(_Lines(pause, event).on_call)
    try:
        if Instruments.OPERATORS in instruments:
            with watch_operators(lambda func, args, kwargs: pause(str(func))):
                yield
        else:
            yield
    finally:
        sys.settrace(before)


def watch_operators(on_operator: OnOperator) -> TorchDispatchMode:
    """A context: `on_operator(func, args, kwargs)` before each operator of the block, in this thread."""
    made: TorchDispatchMode = (_BesideCompiler if "torch._dynamo" in sys.modules else _Watch)(on_operator)
    return made


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, on_operator: OnOperator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_operator = on_operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._on_operator(func, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch wraps no function that keeps its compiler away, which imports it first, 2 s."""
        return False


class _BesideCompiler(_Watch):  # type: ignore[no-untyped-call]
    """Where the compiler is imported already, it must be kept from compiling the watch: 2 s and more."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True


class _Lines:
    """event: "line", or "opcode", of which a line has ten."""

    def __init__(self, pause: Pause, event: str) -> None:
        self._pause, self._event = pause, event

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not is_own(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        return self._on_line

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == self._event:
            self._pause(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._on_line


_NO_MODELS = (
    "torch",
    "numpy",
    "PIL",
    "msgspec",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "_pytest",
    "hypothesis",
    "pluggy",
)
"""Packages that are nobody's model: their lines would be points, hundreds of them."""
_LIBRARIES = tuple(
    str(Path(folder)) + "/"
    for folder in {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        str(Path(__file__).parent),
        *(str(Path(__file__).parents[1] / ours) for ours in ("core", "engine", "runtime")),
    }
)
"""Neither is the standard library, nor what calls the model. Other packages may be."""
_own: dict[str, bool] = {}


def is_own(filename: str) -> bool:
    """Whether the lines of this file belong to a model."""
    known = _own.get(filename)
    if known is None:
        _, packages, inside = filename.rpartition("/site-packages/")
        if packages:
            known = inside.split("/")[0] not in _NO_MODELS
        else:
            known = not filename.startswith(("<", *_LIBRARIES))
        _own[filename] = known
    return known


def prepare() -> None:
    """What torch puts off until its first watched operator is done now, not inside of a trial."""
    with watch_operators(lambda func, args, kwargs: None):
        torch.zeros(1).add_(1)


def place_of_caller() -> str:
    """The nearest line of the model's own code that leads here, as file:line."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_own(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "a module without lines of its own"
