"""A language model's runner driven without an engine: sequences decoded side by side, in this process.

Owns: the loop, and what of it is timed. Must not know: what is compared. The sampler and the making of
text are in it, HTTP and scheduling are not.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Values

from deployments.core.generation import GenerationRequest, Sampling
from deployments.engine.sequence import Sequence, Step, Work
from deployments.models.smollm2 import SmolLM2

_LIMIT = 1_500
"""Tokens of a sequence that never ends by itself: no window here lasts as long."""


class Decoder:
    """A loaded model and its runner with `slots` slots."""

    def __init__(self, model: SmolLM2, slots: int) -> None:
        self._model = model
        self._runner = model.make_runner(slots=slots, blocks=2)

    def begin(self, prompts: Values[Values[int]]) -> list[Sequence]:
        """A sequence a prompt, each with its first token, greedy, whatever ends the text ignored."""
        found = []
        for slot, prompt in enumerate(prompts):
            request = GenerationRequest(
                prompt=prompt, max_tokens=_LIMIT, sampling=Sampling(temperature=0.0), ignore_eos=True
            )
            (sequence,) = self._model.prepare(request)
            sequence.slot = slot
            found.append(sequence)
            self._step([sequence])
        return found

    def go_on(
        self, sequences: Values[Sequence], steps: int, clock: Callable[[], float] = time.perf_counter
    ) -> float:
        """So many steps of all of them -> tokens a second of this clock."""
        began = clock()
        for _ in range(steps):
            self._step(sequences)
        return len(sequences) * steps / (clock() - began)

    def end(self, sequences: Values[Sequence]) -> None:
        """Their slots are free again."""
        freed = [sequence.slot for sequence in sequences]
        self._runner.run(Step([], [], freed, [], [], "", 0.0))

    def _step(self, sequences: Values[Sequence]) -> None:
        works = [Work(one, one.computed, one.known - one.computed, True, one.blocks) for one in sequences]
        step = Step(works, [], [], [], [], "", 0.0)
        for one, made in zip(works, self._runner.run(step), strict=True):
            if made.error is not None or made.token is None:
                raise RuntimeError(f"no token came: {made.error}")
            one.sequence.computed += one.count
            one.sequence.known += made.units
            one.sequence.tokens.append(made.token)
