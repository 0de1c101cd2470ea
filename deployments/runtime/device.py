"""Which device a replica computes on, its threads, and copies ahead of their use.

Owns: the choice of "cuda" or "cpu", torch's thread count, pinned copies on a side stream.
Must not know: models, batches' meaning, Ray (it hides the GPUs that aren't ours).
Source: pytorch.org/docs/stable/notes/cuda.html, "Use pinned memory buffers".
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deployments.runtime.tensors import map_tensors


def choose_device(num_gpus: float) -> str:
    """ "cuda" where the replica was given a GPU (a fraction counts) and one is there, else "cpu"."""
    return "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"


def usable_cpus() -> int:
    """CPUs that this process may run on; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


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
    seen = 0
    found: BaseException | None = error
    while found is not None and seen < 8:
        if isinstance(found, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(found, RuntimeError) and any(t in str(found) for t in _OUT_OF_MEMORY_TEXTS):
            return True
        found, seen = found.__cause__, seen + 1
    return False


_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # DefaultCPUAllocator
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def release_memory() -> None:
    """After out of memory: give cached blocks back, so that the smaller retry finds them."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_device_lost(error: BaseException) -> bool:
    """True for a CUDA error that sticks (a device-side assert, an illegal access): after it every
    call on this process's context fails, so only a new process helps. Out of memory is none."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", ())
    try:
        return isinstance(error, accelerator_error) or "CUDA error:" in str(error)
    except Exception:  # an exception that can't be printed
        return False
