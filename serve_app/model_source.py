"""What the source of a user's model tells before anything is imported or started.

Owns: finding a module's source, the names it binds, the methods a class shows. Must not know: configuration
keys, Ray; importing a model (torch, 3 s) is the replica's.
"""

import ast
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path


def read_source(module: str, folder: Path) -> str | None:
    """The module's source without running it (its parent packages are imported); None: no source.

    Raises ModuleNotFoundError where there is no such module.
    """
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(module)
    finally:
        sys.path.remove(str(folder))
    if spec is None:
        raise ModuleNotFoundError(module, name=module)
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8")


def missing_methods(source: str, name: str, required: Mapping[str, str]) -> list[str]:
    """Of the methods that a model must have (name to signature) those that its class does not show; a class
    with bases or decorators may get them from there, and one made in another way isn't looked at."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            if node.bases or node.keywords or node.decorator_list:
                return []
            shown = {getattr(part, "name", None) for part in node.body}
            shown |= {
                t.id for p in node.body if isinstance(p, ast.Assign) for t in p.targets if hasattr(t, "id")
            }
            return [signature for method, signature in required.items() if method not in shown]
    return []


def top_names(source: str) -> tuple[set[str], bool]:
    """Names that the module's top level binds, and whether these are all (no `import *`, no tricks)."""
    names: set[str] = set()
    is_complete = True
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
            is_complete &= node.name != "__getattr__"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                names.add((alias.asname or alias.name).partition(".")[0])
                is_complete &= alias.name != "*"
    return names, is_complete
