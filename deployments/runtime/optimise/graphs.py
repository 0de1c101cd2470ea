"""CUDA graphs: a module's kernels recorded once for each size of batch and launched as one.

Owns: the graphs, their static inputs, and who may use them when. Must not know: models.
Source: pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deployments.runtime.tensors import map_tensors

WARM_UPS = 3
"""Runs before recording: libraries choose their kernels and allocate in the first."""

Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class Graphs:
    """Answers by the smallest graph that holds the batch; what no graph fits runs eagerly.

    Any thread and stream: the static tensors are one user's at a time, and the answer is a copy.
    """

    def __init__(self, plain: Callable[..., Any], inputs: Sequence[tuple[torch.Tensor, ...]]) -> None:
        self._plain, self._lock = plain, threading.Lock()
        self._graphs: dict[Signature, dict[int, tuple[torch.cuda.CUDAGraph, tuple[Any, ...], Any]]] = {}
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        largest: dict[Signature, tuple[torch.Tensor, ...]] = {}
        for args in inputs:
            known = largest.get(_signature(args))
            if known is None or len(known[0]) < len(args[0]):
                largest[_signature(args)] = args
        for signature, args in largest.items():
            size = 1
            while size < 2 * len(args[0]):
                self._graphs.setdefault(signature, {})[size] = self._record(args, size)
                size *= 2

    def _record(self, args: tuple[torch.Tensor, ...], size: int) -> Any:
        static = tuple(_sized(part, size) for part in args)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(WARM_UPS):
                self._plain(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.inference_mode():
            output = self._plain(*static)
        return graph, static, output

    def __call__(self, *args: torch.Tensor) -> Any:
        sizes = self._graphs.get(_signature(args), {})
        rows = len(args[0])
        size = min((known for known in sizes if known >= rows), default=None)
        if size is None:
            return self._plain(*args)
        graph, static, output = sizes[size]
        with self._lock:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # the last user's copies, perhaps on another stream
            for part, own in zip(args, static, strict=True):
                own[:rows].copy_(part)
            graph.replay()
            answer = map_tensors(output, lambda tensor: tensor[:rows].clone())
            self._done.record(stream)
        return answer


def _signature(args: Sequence[torch.Tensor]) -> Signature:
    return tuple((tuple(part.shape[1:]), part.dtype) for part in args)


def _sized(part: torch.Tensor, rows: int) -> torch.Tensor:
    """`rows` rows of real values, repeated where there are too few."""
    times = -(-rows // len(part))
    return part.repeat(times, *[1] * (part.dim() - 1))[:rows].clone()
