"""What a verdict is about: the model's code, its arguments, the versions it ran with.

Owns: that key, from source files, without importing or loading the model. Must not know: torch, verdicts.
Comments and docstrings may change without a new audit, code may not; what is imported by a name made at run
time is not seen, nor are files that `load` reads. Weights are told apart after loading
(runtime/digest.digest_of), since a class may read them from anywhere.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from deployments.audit.target import Target

FORMAT = 4
"""Grows when the audit itself decides otherwise than before: stored verdicts are made anew then."""
OUR_OWN = "deployments"
SLOW_LIBRARIES = {"transformers": "transformers.modeling_utils"}
"""What a source names: the part of it that takes the time, 3 s."""
_LIBRARIES = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def code_key(target: Target) -> str:
    """Hex; equal where a verdict of one holds for the other, but for the weights.

    Raises ValueError where the source can't be found or read.
    """
    path = source_of(target)
    if path is None:
        raise ValueError(f"there is no source file for {target.model!r}")
    files, libraries = _reachable(path, Path(target.folder))
    facts = {
        "format": FORMAT,
        "name": target.model.rpartition(":")[2],
        "model_args": target.model_args,
        "optimise": list(target.optimise),
        "device": target.device.partition(":")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "files": files,
        "libraries": {name: _version(name) for name in sorted({*libraries, "torch"})},
    }
    try:
        text = json.dumps(facts, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"model_args: only what JSON knows can be told apart later ({error})") from error
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def source_of(target: Target) -> Path | None:
    """The file in which the target's name is looked up."""
    where = target.model.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(target.folder, where)
    return _file_of(where, Path(target.folder))


def slow_libraries(target: Target) -> list[str]:
    """Modules that each of an audit's processes would import again, for seconds: to be imported once."""
    path = source_of(target)
    try:
        text = "" if path is None else path.read_text()
    except (OSError, UnicodeError):
        return []
    return [module for name, module in SLOW_LIBRARIES.items() if name in text]


def _reachable(first: Path, folder: Path) -> tuple[list[str], set[str]]:
    """(digests of the own files, top-level names of the libraries) that `first` imports."""
    libraries: set[str] = set()
    files: list[str] = []
    waiting = [first.resolve()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        tree = ast.parse(path.read_bytes())
        files.append(hashlib.sha256(_code_of(tree).encode()).hexdigest())
        for name in _imports(tree, path):
            file = _file_of(name, folder, path.parent)
            if file is None or not _is_own(name, file):
                libraries.add(name.partition(".")[0])
            else:
                for one in (file, *_packages_of(file)):
                    if one not in seen:
                        seen.add(one)
                        waiting.append(one)
    return sorted(files), libraries


def _packages_of(file: Path) -> list[Path]:
    """The packages that are imported before it: they run, too."""
    found = []
    folder = file.parent
    while (folder / "__init__.py").is_file():
        found.append((folder / "__init__.py").resolve())
        folder = folder.parent
    return found


def _code_of(tree: ast.Module) -> str:
    """The code without positions, comments and docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                body[0] = ast.Pass()
    return ast.dump(tree)


def _imports(tree: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            yield from (
                str(file) for name in ("", *(a.name for a in node.names)) for file in _files(base / name)
            )


def _file_of(name: str, *folders: Path) -> Path | None:
    """The source of a module, looked up beside the model first; None for what has none, or is no module."""
    if name.endswith(".py"):
        return Path(name).resolve()
    for root in (*folders, *(Path(entry) for entry in sys.path)):
        for file in _files(root.joinpath(*name.split("."))):
            return file
    return None


def _files(base: Path) -> list[Path]:
    """The module, or the package, at a path without its ending."""
    candidates = (base.with_name(f"{base.name}.py"), base / "__init__.py")
    return [candidate.resolve() for candidate in candidates if candidate.is_file()]


def _is_own(name: str, file: Path) -> bool:
    return name.partition(".")[0] == OUR_OWN or not str(file).startswith(_LIBRARIES)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        owners = _owners().get(name, [])  # PIL is pillow's
        return ", ".join(f"{owner} {importlib.metadata.version(owner)}" for owner in sorted(set(owners)))


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
