"""What of an instance the generic variants change: its layers and the modules that forward calls.

Owns: finding and replacing modules wherever an instance holds them. Must not know: what becomes of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from deployments.runtime.modules import modules_of, parts_of


class CantOptimise(Exception):
    """The variant doesn't fit the model; the text says what is missing."""


def outermost(instance: Any) -> list[torch.nn.Module]:
    """The modules that no other module holds. Raises CantOptimise where there are none."""
    found = [module for _, module in modules_of(instance)]
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    roots = [module for module in found if id(module) not in inner]
    if not roots:
        raise CantOptimise("it holds no nn.Module; a model of its own kind needs a method `optimise`")
    return roots


def layers(instance: Any, kind: type[torch.nn.Module]) -> list[torch.nn.Module]:
    """Modules of exactly this class: what a subclass computes is its own. Raises CantOptimise: none."""
    found = [module for _, module in modules_of(instance) if type(module) is kind]
    if not found:
        raise CantOptimise(f"it has no nn.{kind.__name__}")
    return found


def replace(instance: Any, make: Callable[[torch.nn.Module], torch.nn.Module | None]) -> int:
    """Put make(module) in the place of each module for which it isn't None; how many places changed."""
    made: dict[int, torch.nn.Module | None] = {}
    changed = 0
    for holder in _holders(instance):
        for key, part in list(_entries(holder)):
            if not isinstance(part, torch.nn.Module) or isinstance(part, torch.jit.ScriptModule):
                continue
            if id(part) not in made:
                made[id(part)] = make(part)
            new = made[id(part)]
            if new is not None:
                _put(holder, key, new)
                changed += 1
    return changed


def _holders(instance: Any) -> list[Any]:
    """Everything reachable that may hold a module: objects, lists, dicts."""
    seen, found = {id(instance)}, [instance]
    for holder in found:  # grows while it is walked
        for _, part in parts_of(holder):
            if id(part) not in seen and isinstance(part, (torch.nn.Module, list, dict)):
                seen.add(id(part))
                found.append(part)
    return found


def _entries(holder: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(holder, list):
        yield from enumerate(holder)
    elif isinstance(holder, dict):
        yield from holder.items()
    else:
        yield from getattr(holder, "_modules", {}).items()
        yield from getattr(holder, "__dict__", {}).items()


def _put(holder: Any, key: Any, new: torch.nn.Module) -> None:
    if isinstance(holder, (list, dict)):
        holder[key] = new
    else:
        setattr(holder, key, new)
