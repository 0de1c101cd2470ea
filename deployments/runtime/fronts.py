"""What the service of a continuous application asks of its model, for both kinds of models.

Owns: engine limits and KV memory from an application's limits, items to sequences, outputs to values,
what is run to warm up. Must not know: HTTP, Ray, who runs when.
"""

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.core.contract import Limits, ModelCard, TensorSpec
from deployments.core.generation import Delta, GenerationRequest, Sampling
from deployments.engine.blocks import BlockPool
from deployments.engine.engine import Engine
from deployments.engine.scheduler import EngineLimits
from deployments.engine.sequence import Runner, Sequence
from deployments.engine.stream import Chunks
from deployments.runtime.language import LanguageModel
from deployments.runtime.memory import kv_bytes
from deployments.runtime.optimise.apply import apply
from deployments.runtime.stepwise import StepModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica computes. gpu_share: of the device's memory, 1 for a whole one."""

    device: str
    gpu_share: float = 1.0


class Front(Protocol):
    """holds: a slow reader's sequence sits out. chunks: None where a request is all of the input."""

    holds: bool
    chunks: Chunks | None

    @property
    def instance(self) -> Any:
        """The user's own object; after load."""
        ...

    @property
    def has_lost_device(self) -> bool:
        """The device failed in a way that lasts as long as the process."""
        ...

    def load(self, place: Place, limits: Limits) -> tuple[Engine, Runner]:
        """Load the model; model thread. Raises what the model raises."""
        ...

    def card(self, app_name: str) -> ModelCard: ...

    def read_item(self, item: Any) -> Any:
        """An item of /predict as `prepare` takes it; with chunks, the bytes of a stream. Any thread."""
        ...

    def prepare(self, request: Any) -> list[Sequence]:
        """Sequences of one request. Raises ServingError. Any thread."""
        ...

    def answer(self, sequence: Sequence, outputs: list[Any], *, as_tensors: bool) -> Any:
        """/predict's output (or arrays by name) from all outputs of a sequence."""
        ...

    def sample_s(self) -> float:
        """Of the last step, seconds spent on choosing tokens and making text."""
        ...

    def warm_up(self) -> list[Any]:
        """Requests as `read_item` gives them."""
        ...


class StepFront:
    """A step-wise class: one sequence a request, one output list a sequence."""

    holds = True

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self.chunks: Chunks | None = model if model.takes_chunks else None

    @property
    def instance(self) -> Any:
        return self._model.model

    @property
    def has_lost_device(self) -> bool:
        return self._model.has_lost_device

    def load(self, place: Place, limits: Limits) -> tuple[Engine, Runner]:
        self._model.load(place.device, limits.max_streams)
        many = self._model.takes_chunks
        return Engine(
            EngineLimits(
                step_cost=float(limits.max_sequences),
                # Streams are all begun at once, and take turns where more have chunks than fit a step.
                lane_cost=float("inf") if many else float(limits.max_sequences),
                slots=limits.max_streams,
                step_units=limits.max_streams,  # one each; what shares a step is bounded by cost
                burst=1,
                max_waiting=limits.max_queue_items,
            )
        ), self._model

    def card(self, app_name: str) -> ModelCard:
        return self._model.card(app_name)

    def read_item(self, item: Any) -> Any:
        return self._model.read_item(item)

    def prepare(self, request: Any) -> list[Sequence]:
        return [self._model.prepare(request)]

    def answer(self, sequence: Sequence, outputs: list[Any], *, as_tensors: bool) -> Any:
        return self._model.to_tensors(outputs) if as_tensors else self._model.postprocess(outputs)

    def sample_s(self) -> float:
        return 0.0

    def warm_up(self) -> list[Any]:
        return [self._model.read_item(item) for item in self._model.examples()]


class LanguageFront:
    """A decoder-only language model: a sequence a choice, deltas as outputs."""

    holds = False
    chunks: Chunks | None = None

    def __init__(self, model: LanguageModel, optimise: Values[str] = ()) -> None:
        self._model, self._optimise = model, tuple(optimise)
        self._runner: Any = None

    @property
    def instance(self) -> Any:
        return self._model

    @property
    def has_lost_device(self) -> bool:
        return bool(self._runner is not None and self._runner.has_lost_device)

    def load(self, place: Place, limits: Limits) -> tuple[Engine, Runner]:
        model = self._model
        model.load(place.device)
        apply(model, self._optimise, place.device)
        budget = limits.kv_bytes
        if budget is None:
            free = kv_bytes(place.device, gpu_share=place.gpu_share, memory=limits.memory)
            budget = self._enough(free, limits)
        blocks = budget // model.block_bytes
        if blocks < 2:
            raise ValueError(f"kv_bytes: {budget} hold no 2 blocks of {model.block_bytes} bytes; raise it")
        # A request may use all of the context only if the memory holds it: else the context is shorter.
        model.context_tokens = min(model.context_tokens, blocks * model.block_units)
        logger.info(
            "event=kv_memory bytes=%d blocks=%d tokens=%d context_tokens=%d",
            blocks * model.block_bytes,
            blocks,
            blocks * model.block_units,
            model.context_tokens,
        )
        self._runner = model.make_runner(slots=limits.max_sequences, blocks=blocks)
        pool = BlockPool(blocks, model.block_units, shares=model.shares_blocks)
        limit = EngineLimits(
            step_cost=float(limits.max_sequences),
            lane_cost=float(limits.max_sequences),
            slots=limits.max_sequences,
            step_units=max(limits.max_tokens_in_step, limits.max_sequences + 1),
            burst=limits.max_tokens_in_step,
            max_waiting=limits.max_queue_items,
        )
        return Engine(limit, pool), self._runner

    def _enough(self, available: int, limits: Limits) -> int:
        """No more than every slot's whole context, and as much again for the prefix cache."""
        blocks = -(-self._model.context_tokens // self._model.block_units) * limits.max_sequences
        return min(available, 2 * blocks * self._model.block_bytes)

    def card(self, app_name: str) -> ModelCard:
        return ModelCard(
            name=app_name,
            inputs=(TensorSpec("prompt", "BYTES", (-1,)),),
            outputs=(TensorSpec("text", "BYTES", (-1,)),),
            item_schema=self._model.item_schema,
            output_schema=self._model.output_schema,
            examples=tuple(self._model.examples()),
            cost_unit="tokens",
            generates=True,
            context_tokens=self._model.context_tokens,
        )

    def read_item(self, item: Any) -> Any:
        return self._model.read_item(item)

    def prepare(self, request: Any) -> list[Sequence]:
        return self._model.prepare(request)

    def answer(self, sequence: Sequence, outputs: list[Any], *, as_tensors: bool) -> Any:
        deltas: Values[Delta] = outputs
        if as_tensors:
            return {"text": "".join(delta.text for delta in deltas)}
        return self._model.answer(sequence, list(deltas))

    def sample_s(self) -> float:
        times = self._runner.times
        return float(times.sample_s + times.accept_s)

    def warm_up(self) -> list[Any]:
        sampling = Sampling(temperature=0.0)
        return [
            GenerationRequest(
                prompt="A short text to warm up on.", max_tokens=6, sampling=sampling, ignore_eos=True
            )
        ]


def is_language_model(model_class: type) -> bool:
    """Whether the class serves text itself (runtime/language.py) instead of stepping states."""
    return all(hasattr(model_class, name) for name in ("make_runner", "prepare", "read_item", "answer"))


def front_of(model_class: type, model_args: Mapping[str, Any], optimise: Values[str] = ()) -> Front:
    """The front of either kind of class. Raises ModelClassError where it can be neither."""
    if is_language_model(model_class):
        return LanguageFront(model_class(**model_args), optimise)
    return StepFront(StepModel(model_class, model_args, optimise))
