"""One object for any step-wise class (the contract's "For continuous batching"): requests and streams
in, the engine's sequences out, and /predict's answer at the end.

Owns: what happens to a sequence before, between and after its steps; the steps are step_runner.py's.
Must not know: which sequences run when, waiting, HTTP, Ray.

Besides the contract's methods a class may have these, as attributes or methods:

    examples()                  JSON items as /predict takes them: warm-up, conformance, /docs
    preprocess(item)            /predict's item -> request; of a class with chunk: the whole stream's bytes
    postprocess(outputs)        all outputs of a sequence -> /predict's JSON value; default: the list
    to_tensors(outputs)         the same as {output name: array}, for /v2
    last_chunk(rest)            what is left when the input ends -> list of chunks; default: nothing may be
    many_outputs = True         each entry of step's outputs is a list of JSON values, sent one by one
    one_item = True             a /v2 tensor is one item as a whole; preprocess gets the numpy array

and inputs, outputs, media_types, item_key, item_schema, output_schema, cost_unit as in adapter.py.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployments.core.contract import ModelCard, Streams
from deployments.core.errors import InvalidItem, ModelBroken
from deployments.engine.sequence import Advance, Step
from deployments.engine.sequence import Sequence as EngineSequence
from deployments.runtime import items, tensors, user_code
from deployments.runtime.device import on_device
from deployments.runtime.model_class import ModelClassError, declared_by, parse_specs, positive_number
from deployments.runtime.optimise.apply import apply
from deployments.runtime.step_runner import Stepping, StepRunner
from deployments.runtime.stepwise_class import check_stepwise

MAX_REST_BYTES = 16 * 1024 * 1024
"""Of a stream that made no chunk yet, as much as a whole body may have by default; each piece that
comes is joined to it, so the bound is one on CPU too."""


class StepModel:
    """One instance of a step-wise class, and the engine's Runner for it.

    `load` and `run` belong to the model thread; the rest is called from any other, and as safely as
    the user's own methods are. Raises ModelClassError at once where the class can't be right.
    """

    def __init__(
        self, model_class: type, model_args: Mapping[str, Any], optimise: Sequence[str] = ()
    ) -> None:
        check_stepwise(model_class, model_args)
        self.name = model_class.__name__
        self.takes_chunks = hasattr(model_class, "chunk")
        self._class, self._args, self._optimise = model_class, dict(model_args), tuple(optimise)
        self._bind(model_class)

    def _bind(self, model: Any) -> None:
        """Look up what is optional once: on the class first, on the instance after load."""

        def method(name: str) -> Callable[..., Any] | None:
            return getattr(model, name, None)

        self._model = model
        self._chunk, self._last_chunk = method("chunk"), method("last_chunk")
        self._key, self._cost = method("key"), method("cost")
        self._preprocess, self._postprocess = method("preprocess"), method("postprocess")
        self._to_tensors = method("to_tensors")
        self._has_many = bool(declared_by(model, "many_outputs"))
        self.one_item = bool(declared_by(model, "one_item"))
        self.inputs = parse_specs(declared_by(model, "inputs"), f"{self.name}.inputs", "input")
        self.outputs = parse_specs(declared_by(model, "outputs"), f"{self.name}.outputs", "output")

    # Once

    def load(self, device: str, slots: int) -> None:
        """Make the instance and load it; `slots`: the most sequences that may have begun at once.

        What the class raises comes through as it is; ModelClassError where its examples() can't be.
        """
        with on_device(device):
            model = self._class(**self._args)
            model.load(device)
            apply(model, self._optimise, device)
        self._bind(model)
        self._runner = StepRunner(
            model, device=device, slots=slots, takes_chunks=self.takes_chunks, has_many=self._has_many
        )
        self._examples = user_code.examples_of(model)
        for index, item in enumerate(self._examples):
            try:
                self.read_item(item)
            except InvalidItem as error:
                raise ModelClassError(f"{self.name}.examples()[{index}] is refused: {error}") from error

    def examples(self) -> list[Any]:
        """The class's own examples() as JSON values; empty where it has none."""
        return list(self._examples)

    @property
    def model(self) -> Any:
        """The user's instance; the class before load."""
        return self._model

    @property
    def state_bytes(self) -> int:
        """Held by the states of all sequences that have begun."""
        return self._runner.slots.bytes

    @property
    def has_lost_device(self) -> bool:
        """True once a step found the GPU unusable for this process."""
        return self._runner.has_lost_device

    @property
    def failed_ends(self) -> int:
        """How often the class's end raised; the log has it."""
        return self._runner.failed_ends

    def card(self, app_name: str) -> ModelCard:
        """What HTTP may know; after load. ModelClassError where a schema is no JSON."""
        return replace(
            user_code.card_of(self._model, app_name, self.inputs, self.outputs),
            examples=tuple(self._examples),
            streams=Streams.CHUNKS if self.takes_chunks else Streams.REQUEST,
            one_item=self.one_item,
        )

    # Per sequence, before and between its steps

    def read_item(self, item: Any) -> Any:
        """/predict's item -> request, or of a class with chunks the bytes of the whole stream.

        Raises InvalidItem where the model can't take it, ModelFailed where preprocess raises.
        """
        if not self.one_item:
            item = items.plain_json(item)
        if self._preprocess is not None:
            item = user_code.read("preprocess", self._preprocess, item)
        if not self.takes_chunks or isinstance(item, (bytes, bytearray, memoryview)):
            return item
        if self._preprocess is not None:
            raise ModelBroken(f"preprocess returned {items.name_of(item)}, not the bytes of a stream")
        raise InvalidItem(f"expected the raw bytes of a stream, got {items.name_of(item)}")

    def prepare(self, request: Any) -> EngineSequence:
        """A sequence for the engine. A class with chunks begins with None, whatever `request` is: on
        /predict and on /stream alike its input are bytes.

        Raises InvalidItem where key or cost raise ValueError, else ModelFailed or ModelBroken.
        """
        request = None if self.takes_chunks else request
        key: Hashable = "" if self._key is None else user_code.read("key", self._key, request)
        try:
            hash(key)
        except TypeError as error:
            raise ModelBroken(f"key returned {items.name_of(key)}, not a string, number or tuple") from error
        return EngineSequence(
            payload=Stepping(request, key),
            key=key,
            cost=self._cost_of(request),
            known=0 if self.takes_chunks else 1,
            is_open=self.takes_chunks,
        )

    def _cost_of(self, request: Any) -> float:
        cost = 1.0 if self._cost is None else user_code.read("cost", self._cost, request)
        if not positive_number(cost):
            raise ModelBroken(f"cost returned {cost!r:.40}, not a number above 0")
        return float(cost)

    def split(self, sequence: EngineSequence, data: bytes) -> int:
        """More of a stream's bytes: how many whole chunks came with them, for the engine's `known`.

        Raises InvalidItem, ModelFailed or ModelBroken; the stream is to end then.
        """
        stepping: Stepping = sequence.payload
        assert self._chunk is not None
        result = user_code.read("chunk", self._chunk, stepping.rest + data)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ModelBroken(f"chunk returned {items.name_of(result)}, not (list of chunks, rest)")
        chunks, rest = result
        if not isinstance(rest, (bytes, bytearray, memoryview)):
            raise ModelBroken(f"chunk returned {items.name_of(rest)} as the rest, not bytes")
        if len(rest) > MAX_REST_BYTES:
            raise InvalidItem(f"the stream's last {MAX_REST_BYTES >> 20} MiB hold no whole chunk")
        stepping.rest = bytes(rest)
        return self._append(stepping, chunks, "chunk")

    def finish_input(self, sequence: EngineSequence) -> int:
        """The input has ended: how many chunks its rest makes. Raises as `split` does."""
        stepping: Stepping = sequence.payload
        rest, stepping.rest = stepping.rest, b""
        if self._last_chunk is not None:
            chunks = user_code.read("last_chunk", self._last_chunk, rest)
            return self._append(stepping, chunks, "last_chunk")
        if rest:
            raise InvalidItem(f"the stream ended within a chunk: {len(rest)} bytes are too few for another")
        return 0

    @staticmethod
    def _append(stepping: Stepping, chunks: Any, what: str) -> int:
        if not isinstance(chunks, (list, tuple)):
            raise ModelBroken(f"{what} returned {items.name_of(chunks)}, not a list of chunks")
        stepping.chunks.extend(chunks)
        return len(chunks)

    # After the last step

    def postprocess(self, outputs: Sequence[Any]) -> Any:
        """All outputs of a sequence -> JSON value. ModelBroken, ModelFailed as for any model."""
        if self._postprocess is None:
            return list(outputs)
        return tensors.to_json(user_code.call("postprocess", self._postprocess, list(outputs)))

    def to_tensors(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """All outputs of a sequence -> {output name: numpy array or list of str}."""
        if self._to_tensors is not None:
            named: dict[str, Any] = user_code.call("to_tensors", self._to_tensors, list(outputs))
        else:
            named = tensors.to_named_arrays(self.postprocess(outputs), self.outputs)
        if not tensors.is_finite(named):
            raise ModelBroken("output holds NaN or Infinity")
        return named

    # Steps, on the model thread

    def run(self, step: Step) -> list[Advance]:
        """See StepRunner.run: one Advance for each of `step.work`, in order."""
        return self._runner.run(step)
