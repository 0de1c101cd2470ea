"""One object for any model class: what the class leaves out is filled in, what it breaks is named.

Owns: calling a user's class (the contract's "Your own model") and turning what it raises into our
errors. Must not know: batches' membership, queues, Ray, HTTP.

Besides the contract's methods a class may have these, as attributes or methods:

    media_types = ("image/jpeg",)     raw bodies that preprocess takes as `bytes`
    item_key = "image_b64"            the JSON field that holds the same bytes in base64
    item_schema, output_schema = {}   JSON Schemas of one item and one output, for /openapi.json
    embeds = True                     one item in, one float vector out: /v1/embeddings fits
    cost_unit = "tokens"              what cost() counts
    max_batch_cost = 4096             its default bound on a batch, in that unit
    measure = "top1"                  how its variants' answers are compared: cosine, relative, top1,
                                      agreement; or a method agreement(eager, variant) -> 0 to 1
    optimise(variant) -> bool         after load: apply one of core/variants.py its own way; False: ours
    pads = True                       collate pads: batch-mates of like cost() are preferred
    warning(example)                  -> (type, message) or None: what was done to the item
    to_tensors(output)                -> {output name: array or list of str}, for /v2

Two examples() of different length say that a dimension may vary; one says that it may not.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deployments.core.contract import ModelCard, TensorSpec
from deployments.core.errors import InvalidItem, ModelBroken
from deployments.runtime import items, tensors, user_code
from deployments.runtime.device import Staged, Stager, is_out_of_memory, on_device
from deployments.runtime.model_class import (
    ModelClassError,
    check_class,
    check_embeds,
    declared_by,
    load_class,
    parse_specs,
    positive_number,
)
from deployments.runtime.optimise.apply import apply

CALL_SIZES = (1, 2, 8)
"""Of the batches that variants are recorded with: one, the least of several, several."""

__all__ = ["Adapter", "ModelClassError", "is_out_of_memory", "load_class"]


class Adapter:
    """One instance of a model class.

    `load`, `collate`, `forward`, `split` and `forward_batch` belong to the model thread; the rest
    is called from any thread, and as safely as the user's own methods are. Raises ModelClassError
    at once where the class can't be right. optimise: variants to apply at load.
    """

    def __init__(
        self, model_class: type, model_args: Mapping[str, Any], optimise: Sequence[str] = ()
    ) -> None:
        check_class(model_class, model_args)
        self.name = model_class.__name__
        self.max_batch_cost: float | None = None
        self._class, self._args, self._optimise = model_class, dict(model_args), tuple(optimise)
        self._model: Any = None
        self._device = "cpu"
        self._examples: list[Any] = []
        self._example_dims: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
        self._bind(model_class)

    def _bind(self, model: Any) -> None:
        """Look up the optional methods once: on the class first, on the instance after load."""

        def method(name: str) -> Callable[..., Any] | None:
            return getattr(model, name, None)

        self._preprocess, self._postprocess = method("preprocess"), method("postprocess")
        self._collate, self._split, self._cost = method("collate"), method("split"), method("cost")
        self._warning, self._to_tensors = method("warning"), method("to_tensors")
        self._forward = model if isinstance(model, torch.nn.Module) else method("forward")
        self.inputs = self._specs(model, "inputs", "input")
        self.outputs = self._specs(model, "outputs", "output")
        self._has_inputs = declared_by(model, "inputs") is not None
        self.declares_outputs = getattr(model, "outputs", None) is not None
        self.pads = bool(getattr(model, "pads", False))
        bound = declared_by(model, "max_batch_cost")
        if bound is not None and not positive_number(bound):
            raise ModelClassError(f"{self.name}.max_batch_cost must be a number above 0")
        self.max_batch_cost = None if bound is None else float(bound)

    def _specs(self, model: Any, attribute: str, default: str) -> tuple[TensorSpec, ...]:
        where = f"{self.name}.{attribute}"
        return parse_specs(declared_by(model, attribute), where, default)

    # Once

    def load(self, device: str) -> None:
        """Make the instance and load it on `device`; on the model thread.

        What the class raises comes through as it is; ModelClassError where examples() are no JSON or
        don't pass the class's own preprocess, or what it declares can't be served.
        """
        with on_device(device):
            model = self._class(**self._args)
            model.load(device)
        self._model, self._device = model, device
        self._stager = Stager(device)
        self._bind(model)
        if getattr(model, "embeds", False):
            check_embeds(self.outputs, self.name)
        self._examples = user_code.examples_of(self._model)
        self._example_dims = self._dims_of_examples()
        if self._optimise:
            with on_device(device):
                apply(model, self._optimise, device, self._calls())

    def _calls(self) -> list[Callable[[], Any]]:
        """Forwards of each example alone and several times, to record and calibrate variants with."""
        examples = [self.preprocess(item) for item in self._examples]
        batches = [[example] * n for n in CALL_SIZES for example in examples]
        if self._collate is not None and len(examples) > 1:
            batches.append(examples)
        return [partial(self.forward_batch, batch) for batch in batches]

    def _dims_of_examples(self) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
        """Shape that all examples share, -1 where they differ; None: nothing to compare with."""
        if self._collate is not None or (self._has_inputs and self._preprocess is None):
            return None
        examples = []
        for index, item in enumerate(self._examples):
            try:
                examples.append(self._to_example(item))
            except InvalidItem as error:
                raise ModelClassError(
                    f"{self.name}.examples()[{index}] is refused by its preprocess: {error}"
                ) from error
        return items.common_dims(examples)

    @property
    def model(self) -> Any:
        """The user's instance; None before load."""
        return self._model

    def examples(self) -> list[Any]:
        """JSON items that the model takes, or []; made once, at load."""
        return list(self._examples)

    def card(self, app_name: str) -> ModelCard:
        """What HTTP may know; after load. ModelClassError where a schema is no JSON."""
        card = user_code.card_of(self._model, app_name, self.inputs, self.outputs)
        return replace(
            card, examples=tuple(self.examples()), embeds=bool(getattr(self._model, "embeds", False))
        )

    # Per item, before the batch

    def preprocess(self, item: Any) -> Any:
        """Item -> example. InvalidItem where the model can't take it, ModelFailed where it raises.

        The item is a JSON value, `bytes`, or a numpy array (or a dict of arrays) from /v2.
        """
        example = self._to_example(item)
        self.check_shape(example)
        return example

    def _to_example(self, item: Any) -> Any:
        if self._preprocess is None:
            return items.read_example(item, self.inputs)
        self._check_item(item)
        return user_code.read("preprocess", self._preprocess, items.plain_json(item))

    def _check_item(self, item: Any) -> None:
        """With the model's own preprocess `inputs` describes the item, where that is a list."""
        if not self._has_inputs or len(self.inputs) != 1 or self.inputs[0].datatype == "BYTES":
            return
        if hasattr(item, "shape") or isinstance(item, (list, int, float)):
            items.check_dims(items.shape_of_list(item), self.inputs[0].shape[1:])

    def check_shape(self, example: Any) -> None:
        """Raise InvalidItem where the example contradicts `inputs`, or without it examples()."""
        if self._preprocess is None and self._has_inputs:
            if len(self.inputs) == 1:
                items.check_dims(example.shape, self.inputs[0].shape[1:])
                return
            for spec in self.inputs:
                items.check_dims(example[spec.name].shape, spec.shape[1:], spec.name)
        elif isinstance(self._example_dims, tuple) and hasattr(example, "shape"):
            items.check_dims(example.shape, self._example_dims)
        elif isinstance(self._example_dims, dict) and isinstance(example, Mapping):
            for name, dims in self._example_dims.items():
                if hasattr(example.get(name), "shape"):
                    items.check_dims(example[name].shape, dims, name)

    def key(self, example: Any) -> Hashable:
        """Examples share a batch only where their keys are equal; None: with all."""
        return None if self._collate is not None else tensors.key_of(example)

    def cost(self, example: Any) -> float:
        """In the model's cost unit, above 0; ModelBroken where the model says otherwise."""
        if self._cost is None:
            return 1.0
        cost = user_code.call("cost", self._cost, example)
        if not positive_number(cost):
            raise ModelBroken(f"cost returned {cost!r:.40}, not a number above 0")
        return float(cost)

    def warning(self, example: Any) -> tuple[str, str] | None:
        """(type, message) on what was done to the item but should be known, or None."""
        if self._warning is None:
            return None
        found = user_code.call("warning", self._warning, example)
        return None if found is None else (str(found[0]), str(found[1]))

    # The batch, on the model thread

    def collate(self, examples: Sequence[Any]) -> Any:
        """n examples -> what forward takes, still on the CPU."""
        return tensors.stack(examples) if self._collate is None else self._collate(list(examples))

    def stage(self, collated: Any) -> Staged:
        """Copy a collated batch to the device ahead of `forward`; any thread; back when it is there."""
        with on_device(self._device):
            staged = self._stager.copy(collated)
        staged.wait()
        return staged

    def forward(self, collated: Any) -> Any:
        """Run the model; takes a collated batch or a staged one. Raises what the model raises."""
        staged = collated if isinstance(collated, Staged) else self._stager.copy(collated)
        assert self._forward is not None
        with on_device(self._device), torch.inference_mode():
            return tensors.map_tensors(self._forward(staged.ready()), tensors.to_cpu)

    def split(self, outputs: Any, n: int) -> list[Any]:
        """Outputs on the CPU -> n raw outputs. ModelBroken where there are not n."""
        if self._split is not None:
            parts = list(self._split(outputs, n))
            if len(parts) != n:
                raise ModelBroken(f"split returned {len(parts)} outputs for a batch of {n}")
            return parts
        if self._postprocess is not None or self._to_tensors is not None:
            return tensors.cut(outputs, n)
        if isinstance(outputs, torch.Tensor):
            outputs = outputs.numpy()  # rows of an array cost a fifth of rows of a tensor
        parts = tensors.cut(outputs, n)
        if tensors.is_finite(outputs):
            return parts
        return [p if tensors.is_finite(p) else tensors.NON_FINITE for p in parts]

    def forward_batch(self, examples: Sequence[Any]) -> list[Any]:
        """Collate, run, split: one raw output for each example, in order, on the CPU.

        Raises ModelBroken on a wrong count, and what the model raises, out of memory included.
        """
        return self.split(self.forward(self.collate(examples)), len(examples))

    def padding_share(self, examples: Sequence[Any], collated: Any) -> float:
        """Share of the collated elements that no example brought: 0 where nothing is padded."""
        if self._collate is None:
            return 0.0
        padded = max(tensors.elements(collated), default=0)
        real = sum(max(tensors.elements(example), default=0) for example in examples)
        return max(0.0, 1.0 - real / padded) if padded and real else 0.0

    # Per item, after the batch

    def postprocess(self, output: Any) -> Any:
        """Raw output -> JSON value. ModelBroken on NaN or Infinity, ModelFailed where it raises."""
        if output is tensors.NON_FINITE:
            raise ModelBroken("output holds NaN or Infinity")
        if self._postprocess is None:
            return (
                output.tolist()
                if hasattr(output, "dtype") and self._is_checked
                else (tensors.to_json(output))
            )
        return tensors.to_json(user_code.call("postprocess", self._postprocess, output))

    @property
    def _is_checked(self) -> bool:
        return self._split is None and self._to_tensors is None

    def to_tensors(self, output: Any) -> dict[str, Any]:
        """Raw output -> {output name: numpy array or list of str}, without the batch dimension."""
        if output is tensors.NON_FINITE:
            raise ModelBroken("output holds NaN or Infinity")
        if self._to_tensors is not None:
            named: dict[str, Any] = user_code.call("to_tensors", self._to_tensors, output)
        else:
            if self._postprocess is not None:  # `outputs` describes what leaves, not what forward gave
                output = user_code.call("postprocess", self._postprocess, output)
            named = tensors.to_named_arrays(output, self.outputs)
        if not tensors.is_finite(named):
            raise ModelBroken("output holds NaN or Infinity")
        return named
