"""Variants that record a whole module: TorchScript, torch.export, torch.compile, CUDA graphs.

Owns: which modules are recorded, with which inputs, and what is kept on disk. Must not know: layers. All is
loaded, compiled and warmed up here, on the thread that loads the model: compiling is not thread-safe.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deployments.core.cache import cache_folder, find_or_make
from deployments.runtime.modules import modules_of
from deployments.runtime.optimise.fingerprint import fingerprint
from deployments.runtime.optimise.found import CantOptimise
from deployments.runtime.optimise.graphs import Graphs

Call = Callable[[], Any]
TOLERANCE = 1e-3
"""Relative, of a recorded module against itself on the inputs of all calls: more says that it took another
branch, less is another order of operations."""


@dataclass
class Recorded:
    """A module that forward calls itself, with the positional inputs of each call, all tensors."""

    module: torch.nn.Module
    inputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    plain: Callable[..., Any] = lambda: None

    def use(self, forward: Callable[..., Any]) -> None:
        """Let the module answer by `forward` from now on, once it is shown to give the same."""
        with torch.inference_mode():
            for inputs in self.inputs:
                for _ in range(2):  # TorchScript specialises in its second run
                    found = forward(*inputs)
                if not _is_close(found, self.plain(*inputs)):
                    shapes = [tuple(tensor.shape) for tensor in inputs]
                    raise CantOptimise(f"what was recorded gives other answers for inputs of shape {shapes}")
        vars(self.module)["forward"] = forward


def to_torchscript(instance: Any, calls: Sequence[Call]) -> None:
    """Traced and frozen."""
    for one in record(instance, calls):

        def make(folder: Path, one: Recorded = one) -> None:
            trace: Any = torch.jit.trace
            torch.jit.freeze(trace(one.module, one.inputs[-1], check_trace=False)).save(
                str(folder / "module.pt")
            )

        with _told("it can't be traced"):
            folder = find_or_make(f"variant-torchscript-{fingerprint(one.module, one.inputs)}", make)
            device = one.inputs[0][0].device
            restore: Any = torch.jit.load
            one.use(restore(str(folder / "module.pt"), map_location=device))


def to_export(instance: Any, calls: Sequence[Call]) -> None:
    """Exported with the dimensions that vary left open, compiled ahead of time."""
    _need_compiler()
    for one in record(instance, calls):

        def make(folder: Path, one: Recorded = one) -> None:
            program = torch.export.export(one.module, one.inputs[-1], dynamic_shapes=_varying(one.inputs))
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "module.pt2"))

        with _told("it can't be exported"), torch.no_grad():
            folder = find_or_make(f"variant-export-{fingerprint(one.module, one.inputs)}", make)
            one.use(torch._inductor.aoti_load_package(str(folder / "module.pt2")))


def to_compile(instance: Any, calls: Sequence[Call]) -> None:
    """torch.compile, for the shapes of all calls; its own cache lies beside ours."""
    _need_compiler()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "variant-inductor"))
    for one in record(instance, calls):
        with _told("it can't be compiled"):
            one.use(torch.compile(one.plain, dynamic=True))


def to_cuda_graphs(instance: Any, calls: Sequence[Call]) -> None:
    """A graph for each size of batch, a power of two up to the largest call's."""
    for one in record(instance, calls):
        with _told("it can't be recorded as a CUDA graph"):
            one.use(Graphs(one.plain, one.inputs))


def record(instance: Any, calls: Sequence[Call]) -> list[Recorded]:
    """Modules that are called, but not by another module of the instance. Raises CantOptimise: none."""
    if not calls:
        raise CantOptimise("it is recorded from examples(), and the model has none")
    known = {id(module) for _, module in modules_of(instance)}
    found: dict[int, Recorded] = {}
    depth = 0

    def enter(module: torch.nn.Module, args: Any) -> None:
        nonlocal depth
        if id(module) not in known:
            return
        if depth == 0:
            one = found.setdefault(id(module), Recorded(module, plain=module.forward))
            one.inputs.append(args)
        depth += 1

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= id(module) in known

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        for call in calls:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise CantOptimise("its forward calls no nn.Module that could be recorded")
    for one in found.values():
        if not all(args and all(isinstance(part, torch.Tensor) for part in args) for args in one.inputs):
            name = type(one.module).__name__
            raise CantOptimise(
                f"{name} is called with more than positional tensors: wrap it in a module that isn't"
            )
        # Out of inference mode: tracing and compiling want tensors that could have gradients.
        one.inputs = [tuple(part.clone() for part in args) for args in one.inputs]
    return list(found.values())


def _varying(inputs: Sequence[tuple[torch.Tensor, ...]]) -> tuple[dict[int, Any], ...]:
    """For each input the dimensions in which the calls differ."""
    return tuple(
        {
            dim: torch.export.Dim.AUTO
            for dim in range(parts[0].dim())
            if len({part.shape[dim] for part in parts if part.dim() == parts[0].dim()}) > 1
        }
        for parts in zip(*inputs, strict=True)
    )


def _is_close(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
            return False
        scale = wanted.double().abs().max() if wanted.numel() else 0.0
        return bool(((found.double() - wanted.double()).abs() <= TOLERANCE * scale + 1e-6).all())
    if isinstance(wanted, (tuple, list)):
        return len(found) == len(wanted) and all(map(_is_close, found, wanted))
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_is_close(found[k], wanted[k]) for k in wanted)
    return bool(found == wanted)


def _need_compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise CantOptimise("it compiles C++, and there is no compiler here: install g++, or choose another")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """torch's errors as ours, in a line; its deprecations are no news to who serves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CantOptimise:
        raise
    except Exception as error:
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise CantOptimise(f"{what}: {type(error).__name__}: {line:.300}") from error
