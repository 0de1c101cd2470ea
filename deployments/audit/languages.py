"""A language model as a subject: a call generates a few tokens for its prompts, in one engine of its own.

Owns: that loop. Must not know: schedules, properties. Keys and values belong to the engine, not to the
network: each call has its own, so what is audited is whether the network keeps anything.
"""

from collections.abc import Hashable, Sequence
from typing import Any

from deployments.core.generation import GenerationRequest, Sampling
from deployments.engine.blocks import BlockPool
from deployments.engine.engine import Engine
from deployments.engine.scheduler import EngineLimits
from deployments.runtime.optimise.apply import apply

TOKENS = (2, 1)
"""Generated of the first example: one prefill and one decode; what they keep shows in the second. Of the
others the prefill alone, in half of the time: an overlap with the first has both."""
UNITS = 64
"""KV memory of a call's sequences, tokens each."""
WORDS = 4
"""Of the first example's text, and of each next one more: a prompt of five tokens passes the same code as one
of fifty, at a fifth of the time."""


class LanguageSubject:
    can_batch = True
    pads = False

    def __init__(self, model: Any, device: str, optimise: Sequence[str] = ()) -> None:
        self.tokens = TOKENS
        model.load(device)
        apply(model, optimise, device)
        self.instance, self._model = model, model
        self.examples: Sequence[Any] = model.examples()

    def call(self, batch: Any) -> list[Any]:
        model = self._model
        blocks = len(batch) * -(-UNITS // model.block_units)
        runner = model.make_runner(slots=len(batch), blocks=blocks)
        limits = EngineLimits(
            step_cost=float(len(batch)), lane_cost=float(len(batch)), slots=len(batch),
            step_units=UNITS, burst=UNITS, max_waiting=len(batch),
        )  # fmt: skip
        engine = Engine(limits, BlockPool(blocks, model.block_units, shares=model.shares_blocks))
        sequences = [model.prepare(self._request(item))[0] for item in batch]
        engine.submit(sequences, 0.0)
        outputs: dict[int, list[Any]] = {id(sequence): [] for sequence in sequences}
        while (step := engine.plan(0.0)) is not None:
            advances = runner.run(step)
            for work, advance in zip(step.work, advances, strict=True):
                if advance.error is not None:
                    raise advance.error
                outputs[id(work.sequence)] += [_values(delta) for delta in advance.outputs]
            engine.commit(step, advances, 0.0)
            engine.take_ended()
        return [outputs[id(sequence)] for sequence in sequences]

    def _request(self, item: Any) -> Any:
        if item.change:
            raise ValueError("prompts are not changed")
        request = self._model.read_item(self.examples[item.example])
        sampling = Sampling(temperature=0.0, top_logprobs=2)
        words = text_of(request).split()[: WORDS + item.example]
        return GenerationRequest(
            prompt=" ".join(words) or "a",
            max_tokens=self.tokens[bool(item.example)],
            sampling=sampling,
            ignore_eos=True,
        )

    def key(self, item: Any) -> Hashable:
        return ""

    def length(self, item: Any) -> int:
        return 0


def text_of(request: GenerationRequest) -> str:
    """Of the prompt, or of the chat's last message."""
    if request.messages:
        return str(request.messages[-1].get("content") or "")
    return request.prompt if isinstance(request.prompt, str) else ""


def _values(delta: Any) -> Any:
    """Text and logprobs to 1e-3: tokens may lie near a tie, and rows of a matrix product differ in their last
    bits with how many there are."""
    logprobs = [(one.token, one.logprob) for one in (delta.logprobs or ())]
    return {"text": delta.text, "logprobs": logprobs}
