"""Checks a user's model class by its signatures, before anything is loaded.

Owns: what a model class must look like (the contract's "Your own model") and the messages that say
so. Must not know: instances, tensors, Ray.
"""

import difflib
import importlib
import inspect
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deployments.core.contract import TensorSpec
from deployments.runtime.datatypes import DATATYPES

SIGNATURES = {
    "load": ("device",),
    "forward": ("batch",),
    "preprocess": ("item",),
    "postprocess": ("output",),
    "collate": ("examples",),
    "split": ("outputs", "n"),
    "cost": ("example",),
    "warning": ("example",),
    "to_tensors": ("output",),
    "examples": (),
    "optimise": ("variant",),
}
"""Every method that we call, with its arguments; all but the first two are optional."""

REQUIRED = ("load", "forward")

SHAPE_OF_A_CLASS = """a model class looks like this:

    class Doubler:
        def load(self, device): ...      # once an instance: build the network, .eval().to(device)
        def forward(self, batch): ...    # [B, ...] -> [B, ...], one output for each item
"""


class ModelClassError(Exception):
    """The class, its arguments or its `load` can't be used; shown to who starts the server."""


def load_class(path: str) -> type:
    """Import "module:Class". Raises ModelClassError that says which half is wrong."""
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise ModelClassError(f"model {path!r} is not of the form 'module:Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModelClassError(_missing_module(path, module_name, error)) from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ModelClassError(f"model {path!r}: importing {module_name} raised {what}") from error
    found = getattr(module, class_name, None)
    if found is None:
        names = [n for n, v in vars(module).items() if inspect.isclass(v)]
        raise ModelClassError(
            f"model {path!r}: {module_name} has no {class_name}{_nearest(class_name, names)}"
        )
    if not inspect.isclass(found):
        raise ModelClassError(f"model {path!r} is a {type(found).__name__}, not a class; {SHAPE_OF_A_CLASS}")
    return found


def _missing_module(path: str, module_name: str, error: ModuleNotFoundError) -> str:
    missing = error.name or module_name
    if module_name == missing or module_name.startswith(missing + "."):
        return (
            f"model {path!r}: there is no module {missing}; it must lie where the server "
            "is started, or be installed"
        )
    return f"model {path!r}: {module_name} imports {missing}, which is not installed"


def check_class(model_class: type, model_args: Mapping[str, Any]) -> None:
    """Raise ModelClassError unless the class can be made with `model_args` and called by us."""
    if not inspect.isclass(model_class):
        raise ModelClassError(f"{model_class!r} is not a class; {SHAPE_OF_A_CLASS}")
    for method in REQUIRED:
        require_method(model_class, method, SIGNATURES[method], SHAPE_OF_A_CLASS)
    check_use(model_class, model_args, SIGNATURES)


def check_use(
    model_class: type, model_args: Mapping[str, Any], signatures: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise ModelClassError unless what the class has of `signatures` can be called so, and its
    arguments and declared tensors fit."""
    for method, arguments in signatures.items():
        if _has_method(model_class, method):
            _check_method(model_class, method, arguments)
    _check_arguments(model_class, model_args)
    parse_specs(declared_by(model_class, "inputs"), f"{model_class.__name__}.inputs", "input")
    parse_specs(declared_by(model_class, "outputs"), f"{model_class.__name__}.outputs", "output")


def require_method(model_class: type, method: str, arguments: tuple[str, ...], shape: str) -> None:
    """Raise ModelClassError, with the shape of a right class, where `method` is missing."""
    if not _has_method(model_class, method):
        right = _definition(method, arguments)
        raise ModelClassError(f"{model_class.__name__} has no {method}; add `{right}`. {shape}")


def _has_method(model_class: type, method: str) -> bool:
    found = inspect.getattr_static(model_class, method, None)
    return found is not None and getattr(found, "__name__", "") != "_forward_unimplemented"


def _definition(method: str, arguments: tuple[str, ...]) -> str:
    return f"def {method}({', '.join(('self', *arguments))})"


def _check_method(model_class: type, method: str, arguments: tuple[str, ...]) -> None:
    name, right = model_class.__name__, _definition(method, arguments)
    found = inspect.getattr_static(model_class, method)
    if not callable(getattr(model_class, method)):
        raise ModelClassError(f"{name}.{method} is not a method; it must be `{right}`")
    function = inspect.unwrap(getattr(model_class, method))
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ModelClassError(f"{name}.{method} is async; it must be a plain `{right}`")
    is_bound = isinstance(found, (staticmethod, classmethod))
    if not _takes(getattr(model_class, method), len(arguments) + (0 if is_bound else 1)):
        signature = inspect.signature(function)
        raise ModelClassError(f"{name}.{method}{signature} must be `{right}`")


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: it will say itself when called
        return True
    return True


def _check_arguments(model_class: type, model_args: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(model_class)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**model_args)
    except TypeError as error:
        names = [
            p.name
            for p in signature.parameters.values()
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        wrong = next((key for key in model_args if key not in names), "")
        raise ModelClassError(
            f"model_args don't fit {model_class.__name__}{signature}: {error}"
            + (_nearest(wrong, names) if wrong else "")
        ) from error


def _nearest(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def declared_by(model: Any, name: str) -> Any:
    """An optional attribute of a class or an instance; None without it, or while only an instance
    can say: a property of a class."""
    found = getattr(model, name, None)
    return None if inspect.isclass(model) and hasattr(type(found), "__get__") else found


def parse_specs(declared: Any, where: str, default_name: str) -> tuple[TensorSpec, ...]:
    """Read `inputs` or `outputs`: a list of (name, datatype, shape), the shape's first dim -1.

    None gives the contract's default, one FP32 tensor of any shape. Raises ModelClassError.
    """
    if declared is None:
        return (TensorSpec(default_name, "FP32", (-1,)),)
    if not isinstance(declared, (list, tuple)) or not declared:
        raise ModelClassError(f'{where} must be a list like [("x", "FP32", [-1, 4])]')
    specs = tuple(_parse_spec(entry, where) for entry in declared)
    if len({spec.name for spec in specs}) < len(specs):
        raise ModelClassError(f"{where} names a tensor twice")
    return specs


def _parse_spec(entry: Any, where: str) -> TensorSpec:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3 or not isinstance(entry[0], str):
        raise ModelClassError(f'{where}: {entry!r} is not of the form ("x", "FP32", [-1, 4])')
    name, datatype, shape = entry
    if datatype not in DATATYPES:
        near = _nearest(str(datatype), sorted(DATATYPES))
        raise ModelClassError(f"{where}: unknown datatype {datatype!r} of {name!r}{near}")
    if not isinstance(shape, (list, tuple)) or not all(type(dim) is int and dim >= -1 for dim in shape):
        raise ModelClassError(f"{where}: the shape of {name!r} must be a list like [-1, 4]")
    if not shape or shape[0] != -1:
        raise ModelClassError(f"{where}: the shape of {name!r} must begin with -1, the number of items")
    return TensorSpec(name, datatype, tuple(shape))


def positive_number(value: Any) -> bool:
    """True for a finite number above zero, numpy's too (bools are not numbers)."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        number = float(value)
    except OverflowError:  # an int beyond float's range
        return False
    return math.isfinite(number) and number > 0


def as_json(value: Any, where: str) -> Any:
    """What JSON makes of the value (a tuple becomes a list). Raises ModelClassError, naming `where`."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # lone surrogates are no UTF-8
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelClassError(f"{where} must be a JSON value, as a caller would send it: {error}") from error


def check_embeds(outputs: Sequence[TensorSpec], name: str) -> None:
    """Raise ModelClassError unless an embedding's length is declared: OpenAI's clients ask for it."""
    shape = outputs[0].shape
    if len(shape) == 2 and shape[1] > 0:
        return
    wanted = f'outputs = [("{outputs[0].name}", "FP32", [-1, 384])]'
    raise ModelClassError(
        f"{name}.embeds is True, but its output {outputs[0].name!r} is declared as {list(shape)}: "
        f"declare the length of the vector, like `{wanted}` (load may set it)"
    )
