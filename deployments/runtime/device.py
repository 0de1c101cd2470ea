"""Which device a replica computes on, its threads, and copies ahead of their use.

Owns: the choice of "cuda" or "cpu", torch's thread count, pinned copies on a side stream.
Must not know: models, batches' meaning, Ray (it hides the GPUs that aren't ours).
Source: pytorch.org/docs/stable/notes/cuda.html, "Use pinned memory buffers".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deployments.core.machine import usable_cpus
from deployments.runtime.tensors import map_tensors


def choose_device(num_gpus: float) -> str:
    """ "cuda" where the replica was given a GPU (a fraction counts) and one is there, else "cpu"."""
    return "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"


def set_threads(count: int | None = None) -> int:
    """Set torch's threads inside an operator; call it on the model thread, before the model loads.

    None: every usable CPU. Ray sets OMP_NUM_THREADS from num_cpus (0.1 means 1), so torch's own
    default is wrong in a replica. OpenMP keeps the count by thread, hence the model thread.
    """
    chosen = count or usable_cpus()
    torch.set_num_threads(chosen)
    return chosen


class Stager:
    """Copies a collated batch to the GPU ahead of its forward, on a stream of its own.

    On a CPU everything here is the identity. `copy` may run on another thread than `ready`.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def copy(self, collated: Any) -> "Staged":
        """Start copying every tensor in `collated`; returns at once."""
        if self._stream is None:
            return Staged(collated, None, ())
        pinned: list[torch.Tensor] = []

        def send(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type != "cpu":
                return tensor
            pinned.append(tensor if tensor.is_pinned() else tensor.pin_memory())
            return pinned[-1].to(self.device, non_blocking=True)

        with torch.cuda.stream(self._stream):
            value = map_tensors(collated, send)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return Staged(value, done, tuple(pinned))


class Staged:
    """A batch on its way to the device; keeps the pinned originals until it has arrived."""

    def __init__(self, value: Any, done: "torch.cuda.Event | None", pinned: tuple[torch.Tensor, ...]) -> None:
        self._value, self._done, self._pinned = value, done, pinned

    def wait(self) -> None:
        """Block this thread until the batch has arrived."""
        if self._done is not None:
            self._done.synchronize()

    def ready(self) -> Any:
        """The batch for the current stream, which waits for the copy (the thread does not)."""
        if self._done is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            # The allocator may not hand this memory out again before the model's stream is through.
            map_tensors(self._value, lambda t: t.record_stream(stream) if t.is_cuda else None)
        return self._value


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Make `device` torch's current one in this thread (CUDA's current device is per thread)."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """True where a smaller batch may fit: CUDA, the CPU allocator, or Python's own MemoryError."""
    return any(_means_out_of_memory(found) for found in _with_causes(error))


def _means_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(t in _text_of(error) for t in _OUT_OF_MEMORY_TEXTS)


_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # DefaultCPUAllocator
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_device_lost(error: BaseException) -> bool:
    """True where every later use of the GPU fails too: only a new process has a working one.

    Source: CUDA Runtime API, cudaError, on errors that "leave the process in an inconsistent state".
    """
    return any(_means_lost(found) for found in _with_causes(error))


def _means_lost(error: BaseException) -> bool:
    # As torch words it, from the first letter on: a model's message may quote what a caller sent.
    if not isinstance(error, RuntimeError) or _means_out_of_memory(error):
        return False
    text = _text_of(error)
    is_torchs_own = isinstance(error, getattr(torch, "AcceleratorError", ()))  # since torch 2.8
    if not is_torchs_own and not text.startswith(("CUDA error: ", "CUDA driver error: ")):
        return False
    first_line = text.partition("\n")[0]
    return not any(harmless in first_line for harmless in _SURVIVED_TEXTS)


_SURVIVED_TEXTS = (
    # Refused before anything ran: one batch's fault, such as a grid for an empty or a huge tensor.
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "invalid device ordinal",
    "invalid resource handle",
    "no kernel image is available",
    "operation not permitted when stream is capturing",
    "operation not supported",
    "too many resources requested for launch",
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory left for the handle
)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling; 8 of them at most."""
    found: BaseException | None = error
    for _ in range(8):
        if found is None:
            return
        yield found
        found = found.__context__ if found.__cause__ is None else found.__cause__


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a model's own class: its __str__ may raise anything
        return ""


@contextmanager
def on_stream(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """Queue this thread's work on `stream`; None: nothing changes (a CPU, or the default stream)."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
