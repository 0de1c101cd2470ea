"""A loaded model as the audit calls it: from items to answers, as the server does.

Owns: loading what a target names, examples and changed ones, one call. Must not know: schedules,
properties, processes. An input is an example of the model's own, or one made from it, so that a race can be
told by numbers and shown again elsewhere.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from deployments.audit.languages import LanguageSubject
from deployments.audit.modules_alone import ModuleModel
from deployments.audit.sameness import mapped
from deployments.audit.steps import StepSubject
from deployments.audit.target import Batch, Input, Target
from deployments.runtime import tensors
from deployments.runtime.adapter import Adapter, ModelClassError
from deployments.runtime.fronts import is_language_model
from deployments.runtime.model_class import declared_by
from deployments.runtime.stepwise_class import is_stepwise


class Subject(Protocol):
    """One loaded instance, called as the server calls it. can_batch: several items may share a call.

    pads: items of different lengths share a call, the shorter ones padded.
    """

    instance: Any
    can_batch: bool
    pads: bool

    @property
    def examples(self) -> Sequence[Any]: ...

    def call(self, batch: Batch) -> list[Any]:
        """One answer for each input, in order. Raises what the model raises."""
        ...

    def key(self, item: Input) -> Hashable:
        """Inputs of equal keys may share a call."""
        ...

    def length(self, item: Input) -> int:
        """Of what is padded; the same number for all where nothing is."""
        ...


class BatchSubject:
    """A class with `forward`."""

    can_batch = True

    def __init__(self, model_class: type, target: Target) -> None:
        self._adapter = Adapter(model_class, target.model_args, target.optimise)
        self._adapter.load(target.device)
        self.instance = self._adapter.model
        self.pads = getattr(self.instance, "collate", None) is not None
        self.examples = self._adapter.examples() or _made_up(self._adapter)

    def call(self, batch: Batch) -> list[Any]:
        examples = [self._example(item) for item in batch]
        raw = self._adapter.forward_batch(examples)
        # Both: what is rounded to five labels hides what happened, and postprocess is the model's too.
        return [(part, self._adapter.postprocess(part)) for part in raw]

    def _example(self, item: Input) -> Any:
        # Anew each time: preprocess may note on the instance what forward reads, and what only the first of
        # two calls did would shift the pauses of the second.
        example = self._adapter.preprocess(self.examples[item.example])
        return CHANGES[item.change](example) if item.change else example

    def key(self, item: Input) -> Hashable:
        return self._adapter.key(self._example(item))

    def length(self, item: Input) -> int:
        return sum(tensors.elements(self._example(item))) if self.pads else 0


def load(target: Target) -> Subject:
    """Import, make and load the model; raises ModelClassError, or what the model raises."""
    found, module = find(target)
    if isinstance(found, type) and is_language_model(found):
        return LanguageSubject(found(**target.model_args), target.device, target.optimise)
    if isinstance(found, type) and is_stepwise(found):
        return StepSubject(found, target)
    is_bare = isinstance(found, type) and issubclass(found, torch.nn.Module) and not hasattr(found, "load")
    if isinstance(found, type) and not is_bare:
        return BatchSubject(found, target)
    return BatchSubject(ModuleModel.of(found, module), target)


def find(target: Target) -> tuple[Any, ModuleType]:
    """The class, module or factory that the target names, and the file it is in. Raises ModelClassError."""
    where, _, name = target.model.rpartition(":")
    if not where or not name:
        raise ModelClassError(f"{target.model!r} is not of the form 'path/to/file.py:Class'")
    module = _import_file(Path(target.folder, where)) if where.endswith(".py") else _import(where, target)
    try:
        return getattr(module, name), module
    except AttributeError:
        names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ModelClassError(f"{where} has no {name}; it has {', '.join(names[:12])}") from None


def _import_file(path: Path) -> ModuleType:
    if not path.exists():
        raise ModelClassError(f"there is no file {path}")
    # Once a process: two instances share their module's globals, as in a server.
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    # Its neighbours are importable, as when the server is started beside it.
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelClassError(f"importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _import(name: str, target: Target) -> ModuleType:
    sys.path.insert(0, str(Path(target.folder).resolve()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelClassError(f"importing {name} raised {type(error).__name__}: {error}") from error


def _made_up(adapter: Adapter) -> list[Any]:
    """Items from the declared inputs, of a class without examples(): numbers of shape [8] where it varies."""
    if declared_by(adapter.model, "inputs") is None or any(
        spec.datatype == "BYTES" for spec in adapter.inputs
    ):
        raise ModelClassError(
            f"{adapter.name} has no examples(): add `def examples(self)` with two or three items, of "
            "different lengths where lengths vary; the audit calls the model with them"
        )
    made = []
    for seed in range(3):
        source = np.random.default_rng(seed)
        arrays = {
            spec.name: source.normal(size=[8 if n < 0 else n for n in spec.shape[1:]]).astype(
                "float32" if spec.datatype.startswith("FP") else "int64"
            )
            for spec in adapter.inputs
        }
        values = {name: array.tolist() for name, array in arrays.items()}
        made.append(values if len(values) > 1 else next(iter(values.values())))
    return made


# Changed examples


def _times(value: Any, factor: float) -> Any:
    """Floats times `factor`; whole numbers stay: they name things."""
    return _changed(value, lambda array: array * factor if array.is_floating_point() else array)


def _other(value: Any, seed: int = 7) -> Any:
    """Other values of the same shapes: floats of the same mean and spread, whole numbers in another order."""
    source = torch.Generator().manual_seed(seed)

    def change(array: torch.Tensor) -> torch.Tensor:
        if array.numel() == 0:
            return array
        if array.is_floating_point():
            noise = torch.randn(array.shape, generator=source).to(array.dtype)
            spread = array.float().std().to(array.dtype) if array.numel() > 1 else 1.0
            return array.mean() + noise * (spread or 1.0)
        order = torch.randperm(array.numel(), generator=source)
        return array.reshape(-1)[order].reshape(array.shape)

    return _changed(value, change)


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Every tensor, and every array of numbers, changed."""

    def on_array(array: Any) -> Any:
        return change(torch.from_numpy(array)).numpy() if array.dtype.kind in "biuf" else array

    return mapped(value, change, on_array)


CHANGES: Mapping[str, Callable[[Any], Any]] = {
    "x100": partial(_times, factor=100.0),
    "x-100": partial(_times, factor=-100.0),
    "other": _other,
    **{f"other{seed}": partial(_other, seed=seed) for seed in range(1, 9)},
}


# The calls that a model is audited with


def calls_of(subject: Subject) -> list[Batch]:
    """A few calls that differ in values, shapes and size; each goes through when it is made alone.

    Raises what the model raises on its first example.
    """
    subject.call((Input(0),))
    singles = [Input(0), *(one for one in distinct(subject) if _goes_through(subject, (one,)))]
    batches: list[Batch] = [(one,) for one in singles]
    mates = [one for one in singles if subject.key(one) == subject.key(singles[0])]
    if subject.can_batch:
        batches += [
            batch
            for batch in (tuple(mates[:3]), (mates[-1], mates[0], mates[0], mates[-1]))
            if len(batch) > 1
        ]
    return [batch for batch in dict.fromkeys(batches) if len(batch) == 1 or _goes_through(subject, batch)]


def distinct(subject: Subject) -> list[Input]:
    """Inputs besides the first example: another of its shape, an outlier, another shape."""
    first = Input(0)
    others = [Input(number) for number in range(1, min(len(subject.examples), 8))]
    alike = [
        one
        for one in others
        if (subject.key(one), subject.length(one)) == (subject.key(first), subject.length(first))
    ]
    unlike = [one for one in others if one not in alike]
    return [*(alike[:1] or [Input(0, "other")]), Input(0, "x-100"), *unlike[:2]]


def _goes_through(subject: Subject, batch: Batch) -> bool:
    try:
        subject.call(batch)
    except Exception:  # a changed input may be no input at all: it is left out
        return False
    return True
