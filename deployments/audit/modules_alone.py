"""A bare nn.Module, scripted module or factory of one, as a model class of the contract.

Owns: that wrapping. Must not know: audits. Its `examples` (a function or a list, on the module, its class
or factory, or beside it in the file) are items without a batch dimension: a tensor, a dict of tensors for
keyword arguments, or a tuple of tensors.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch

from deployments.runtime.model_class import ModelClassError


class ModuleModel:
    """made: gives the module. Items are numbers of examples: tensors are no JSON."""

    made: Callable[..., Any]
    places: tuple[Any, ...]

    @staticmethod
    def of(made: Any, beside: ModuleType) -> type:
        """A class with `load` and `forward` for a module, its class or a factory; beside: the file it is in.

        A module that is there already is copied, so that each instance begins with what it was.
        """
        if not callable(made):
            raise ModelClassError(f"{made!r:.60} is no class, module or factory of a module")
        name = getattr(made, "__name__", type(made).__name__)
        is_module = isinstance(made, torch.nn.Module)
        return type(
            name,
            (ModuleModel,),
            {
                "made": staticmethod(partial(copy.deepcopy, made) if is_module else made),
                "places": (made, beside),
            },
        )

    def __init__(self, **args: Any) -> None:
        self._args = args

    def load(self, device: str) -> None:
        self.net = type(self).made(**self._args)
        if not isinstance(self.net, torch.nn.Module):
            raise ModelClassError(f"{type(self).__name__} gave a {type(self.net).__name__}, not an nn.Module")
        self.net.to(device)
        self._examples = self._find_examples()

    def _find_examples(self) -> list[Any]:
        for place in (self.net, *type(self).places):
            found = getattr(place, "examples", None)
            if found is not None:
                given = found() if callable(found) else found
                if not isinstance(given, Iterable):
                    raise ModelClassError(f"examples gave {type(given).__name__}, not a list of inputs")
                return list(given)
        raise ModelClassError(
            f"{type(self).__name__} has no examples: add a function `examples()` to its file that gives "
            "two or three inputs without a batch dimension"
        )

    def examples(self) -> list[int]:
        return list(range(len(self._examples)))

    def preprocess(self, item: int) -> Any:
        return self._examples[item]

    def forward(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            answer = self.net(**batch)
        elif isinstance(batch, tuple):
            answer = self.net(*batch)
        else:
            answer = self.net(batch)
        # transformers' outputs are mappings with attributes; their caches are no answer.
        if isinstance(answer, Mapping):
            return {name: part for name, part in answer.items() if isinstance(part, torch.Tensor)}
        return answer
