"""Steps the sequences of a step-wise class: begins them, gathers their rows, steps, scatters, lets go.

Owns: calling begin, step and end, and what came of a step for each sequence. Must not know: which
sequences run when, streams, HTTP, Ray. What the class raises fails one sequence: a step that raises is
halved until the culprits are known, each time with freshly gathered states, stored only on success.
"""

import logging
import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.core.errors import ModelBroken, ServingError
from deployments.core.isolate import run_isolated
from deployments.core.submission import Result
from deployments.engine.sequence import Advance, Step
from deployments.runtime import items, tensors, user_code
from deployments.runtime.device import is_device_lost, is_out_of_memory, on_device
from deployments.runtime.memory import release_memory
from deployments.runtime.state_slots import Row, StateSlots
from deployments.runtime.stepwise_class import check_state, check_stepped

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Stepping:
    """A sequence's payload. chunks: filled by the event loop, emptied by the model thread.

    chunk: the one of the step that runs. row: None before begin and after the end.
    """

    request: Any
    key: Hashable
    chunks: deque[Any] = field(default_factory=deque)
    rest: bytes = b""
    chunk: Any = None
    row: Row | None = None


class StepRunner:
    """The engine's Runner for a loaded instance; model thread only.

    slots: the most sequences that may have begun at once. has_many: each output is a list of outputs.
    """

    def __init__(self, model: Any, *, device: str, slots: int, takes_chunks: bool, has_many: bool) -> None:
        self.slots = StateSlots(device, slots)
        self.has_lost_device = False
        self.failed_ends = 0
        self._model, self._device = model, device
        self._takes_chunks, self._has_many = takes_chunks, has_many
        self._end = getattr(model, "end", None)

    def run(self, step: Step) -> list[Advance]:
        """Free what ended, begin what is new, step all of `step.work` once; one Advance each, in order."""
        if any(work.count != 1 for work in step.work):
            raise ValueError("a step-wise model takes one unit of each sequence a step")
        with on_device(self._device), torch.inference_mode():
            for sequence in step.ended:
                self._finish(sequence.payload)
            steppings = [work.sequence.payload for work in step.work]
            failed = self._begin_new(steppings)
            ready = [stepping for stepping in steppings if id(stepping) not in failed]
            results = iter(self._step_isolated(ready))
        return [
            Advance(error=failed[id(stepping)]) if id(stepping) in failed else self._advance(next(results))
            for stepping in steppings
        ]

    def _finish(self, stepping: Stepping) -> None:
        """The sequence left, for whatever reason; `end` hears of it where it had begun."""
        row, stepping.row = stepping.row, None
        stepping.chunks.clear()
        if row is None:
            return
        state = {} if self._end is None else row.stack.read(row)
        self.slots.remove(row)
        if self._end is not None:
            try:
                self._end(state)
            except BaseException:  # the sequence is gone: nobody is left to fail
                self.failed_ends += 1
                logger.exception("model=%s end raised", type(self._model).__name__)

    def _begin_new(self, steppings: Iterable[Stepping]) -> dict[int, ServingError]:
        """Begin those that have not; {id: error} of those that can't."""
        failed: dict[int, ServingError] = {}
        for stepping in steppings:
            if stepping.row is None:
                try:
                    state = check_state(user_code.read("begin", self._model.begin, stepping.request))
                    stepping.row = user_code.call("begin", self.slots.add, stepping.key, state)
                except ServingError as error:
                    failed[id(stepping)] = error
        return failed

    def _step_isolated(self, ready: Sequence[Stepping]) -> Sequence[Result]:
        if not ready:
            return ()
        if self._takes_chunks:
            for stepping in ready:
                stepping.chunk = stepping.chunks.popleft()
        isolated = run_isolated(
            self._step_once, ready, is_out_of_memory=is_out_of_memory, on_out_of_memory=release_memory
        )
        for stepping in ready:
            stepping.chunk = None
        return isolated.results

    def _step_once(self, steppings: Sequence[Stepping]) -> list[tuple[Any, Any]]:
        """One call of the model's step; (output, done) of each. The states are stored on success alone."""
        rows = [stepping.row for stepping in steppings]
        stack = rows[0].stack  # type: ignore[union-attr]  # one key a step, and one stack a key
        index = stack.index(rows)  # type: ignore[arg-type]
        states = stack.gather(index)
        shapes = dict(states)  # the model may change the dict that it is given
        try:
            result = self._model.step(states, [stepping.chunk for stepping in steppings])
        except BaseException as error:
            self.has_lost_device = self.has_lost_device or is_device_lost(error)
            raise
        stepped = check_stepped(result, shapes, len(rows))
        stack.scatter(index, stepped.states)
        return list(zip(stepped.outputs, stepped.done, strict=True))

    def _advance(self, result: Result) -> Advance:
        if result.error is not None:
            return Advance(error=result.error)
        output, done = result.output
        try:
            outputs = self._json_outputs(output)
        except ServingError as error:
            return Advance(error=error)
        units = 0 if done or self._takes_chunks else 1
        return Advance(units=units, outputs=outputs, is_done=bool(done))

    def _json_outputs(self, output: Any) -> Sequence[Any]:
        if output is None:
            return ()
        try:
            if not self._has_many:
                return (_to_json(output),)
            if not isinstance(output, (list, tuple)):
                raise ModelBroken(
                    f"many_outputs is True, but an output is {items.name_of(output)}, not a list"
                )
            return [_to_json(part) for part in output]
        except RecursionError as error:
            raise ModelBroken("an output is nested too deep for JSON") from error


def _to_json(output: Any) -> Any:
    # 256 streams a step: our share of each fell from 7.5 us to 4.2 (CPU time, one thread).
    return output if type(output) is dict and _is_flat(output) else tensors.to_json(output)


def _is_flat(output: dict[Any, Any]) -> bool:
    """Of names and plain finite values only, as JSON has them."""
    for name, value in output.items():
        kind = type(value)
        if type(name) is not str or not (math.isfinite(value) if kind is float else kind in (int, str, bool)):
            return False
    return True
