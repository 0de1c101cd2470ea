"""Calling what a user wrote: whatever it raises becomes one of our errors, and fails one item.

Owns: that translation, and what any kind of model class declares of itself (examples, card). Must not
know: batches, steps, threads, Ray, HTTP.
"""

from collections.abc import Callable, Iterable
from typing import Any

from deployments.core.contract import ModelCard, TensorSpec
from deployments.core.errors import InvalidItem, ModelFailed, ServingError
from deployments.runtime.model_class import ModelClassError, as_json


def call(what: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """What the method returns. Raises ModelFailed, naming `what`, where it raises."""
    try:
        return method(*arguments)
    except ServingError:
        raise
    except BaseException as error:  # SystemExit and CancelledError too: only this item fails
        raise ModelFailed.of(f"the model raised {type(error).__name__} in {what}", error) from error


def read(what: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """As `call`, of what a caller sent: a ValueError is the caller's, InvalidItem with its text."""
    try:
        return method(*arguments)
    except ServingError:
        raise
    except ValueError as error:
        raise InvalidItem(str(error) or "the model can't take this item") from error
    except RecursionError as error:
        raise InvalidItem("the item is nested too deep") from error
    except BaseException as error:
        raise ModelFailed.of(f"the model raised {type(error).__name__} in {what}", error) from error


def examples_of(model: Any) -> list[Any]:
    """Its examples() as JSON values; empty without the method. ModelClassError where they are none."""
    method = getattr(model, "examples", None)
    where = f"{type(model).__name__}.examples()"
    given = [] if method is None else method()
    if not isinstance(given, Iterable):
        raise ModelClassError(f"{where} gave {type(given).__name__}, not a list of items")
    found = list(given)
    return [as_json(item, f"{where}[{index}]") for index, item in enumerate(found)]


def card_of(
    model: Any, app_name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> ModelCard:
    """What HTTP may know of a loaded model, its examples aside. ModelClassError where a schema is no JSON."""
    name = type(model).__name__
    return ModelCard(
        name=app_name,
        inputs=inputs,
        outputs=outputs,
        media_types=tuple(getattr(model, "media_types", ())),
        item_key=getattr(model, "item_key", None),
        item_schema=as_json(getattr(model, "item_schema", {}), f"{name}.item_schema"),
        output_schema=as_json(getattr(model, "output_schema", {}), f"{name}.output_schema"),
        cost_unit=str(getattr(model, "cost_unit", "items")),
    )
