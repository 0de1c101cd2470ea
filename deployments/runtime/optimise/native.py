"""Builds int8.cpp for this machine and loads it: once a machine, kept in the user's cache.

Owns: the compiler's flags, the library's place, what is said where it can't be built. Must not know: what is
computed with it. A wheel of ours would have to be built for each kind of CPU; torch's headers, as
torch.utils.cpp_extension uses them, cost 30 s of compiling and a build for each torch, this file 2 s.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch  # noqa: F401  # brings libgomp: the kernels then share its threads, and add none of their own

from deployments.core.cache import find_or_make
from deployments.runtime.optimise.found import CantOptimise

_SOURCE = Path(__file__).with_name("int8.cpp")
_LIBRARY = "int8.so"
_COMPILERS = ("g++", "clang++", "c++")
# Sums may be reordered, as a vector needs; NaN and Infinity must stay what they are.
_FLAGS = [
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
    "-march=native" if platform.machine() == "x86_64" else "-mcpu=native",
]
_PATIENCE_S = 120.0


@cache
def library() -> ctypes.CDLL:
    """The kernels. The first call on a machine compiles them. Raises CantOptimise where that fails."""
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, " ".join(_FLAGS).encode(), _cpu().encode()])).hexdigest()[:16]
    folder = find_or_make(f"native-{key}", _build)
    kernels = ctypes.CDLL(str(folder / _LIBRARY))
    for name in ("brimful_linear", "brimful_attend"):
        getattr(kernels, name).restype = None
    return kernels


def _build(folder: Path) -> None:
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CantOptimise(
            f"its kernels are compiled on first use, and none of {', '.join(_COMPILERS)} is installed"
        )
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(folder / _LIBRARY)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise CantOptimise(f"{compiler} took over {_PATIENCE_S:.0f} s for its kernels") from error
    if done.returncode:
        raise CantOptimise(f"{compiler} can't compile its kernels: {done.stderr[-500:].strip()}")


def _cpu() -> str:
    """What -march=native looks at: a cache may be shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kinds)})])
