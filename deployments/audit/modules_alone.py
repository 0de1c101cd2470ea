"""A bare nn.Module, scripted module or factory of one, as a model class of the contract.

Owns: that wrapping. Must not know: audits. Its `examples` (a function or a list, on the module, its class
or factory, or beside it in the file) are items without a batch dimension: a tensor, a dict of tensors for
keyword arguments, or a tuple of tensors.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from deployments.runtime.model_class import ModelClassError


class ModuleModel:
    """made: gives the module. Items are numbers of examples: tensors are no JSON."""

    made: Callable[..., Any]
    args: Mapping[str, Any]

    @staticmethod
    def of(made: Any, args: Mapping[str, Any]) -> type:
        """A class with `load` and `forward` for a module, its class or a factory."""
        if not callable(made):
            raise ModelClassError(f"{made!r:.60} is no class, module or factory of a module")
        name = getattr(made, "__name__", type(made).__name__)
        is_module = isinstance(made, torch.nn.Module)
        return type(
            name,
            (ModuleModel,),
            {"made": staticmethod((lambda: made) if is_module else made), "source": made},
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
        source = type(self).source  # type: ignore[attr-defined]
        beside = sys.modules.get(getattr(source, "__module__", ""), None)
        for place in (self.net, source, beside):
            found = getattr(place, "examples", None)
            if found is not None:
                return list(found() if callable(found) else found)
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
