"""How much memory a replica may use, what it uses, and what is left for keys and values.

Owns: the budget on a GPU (enforced by torch's allocator) and on a CPU (resident memory, looked at after each
batch); giving freed memory back. Must not know: models, blocks, queues.
Source: pytorch.org/docs/stable/notes/cuda.html, "Memory management"; proc(5), clear_refs and VmHWM.
"""

import ctypes
import logging
import resource
import sys
from pathlib import Path

import torch

from deployments.core import machine

logger = logging.getLogger(__name__)

CPU_SHARE = 0.25
"""Of the memory that is free at start, for keys and values. A CPU's memory belongs to other replicas and
programs as well, and what is not written costs nothing."""
GPU_SHARE = 0.9
"""Of what is left of this replica's share of the GPU after the weights; activations need the rest."""


class BudgetError(ValueError):
    """The model alone takes more than `memory` allows; the message says what to change."""


class Budget:
    """`memory` of one replica, in bytes of its device.

    memory: bytes above 1, of which there are no more than the device has, or a share of the replica's part of
    the device: of a GPU `gpu_share` of its memory; of a CPU all that the machine, or the container, has.
    """

    def __init__(self, device: str, memory: float, gpu_share: float = 1.0) -> None:
        self._device = torch.device(device)
        self._gpu_share = gpu_share
        reset_peak()
        # A sandbox may keep the peak for good; then it says nothing of any batch.
        self._resets = peak_bytes() <= resident_bytes() + 2**26
        self.bytes = 0
        self.set(memory)

    @property
    def is_gpu(self) -> bool:
        return self._device.type == "cuda"

    def set(self, memory: float) -> None:
        """Another budget from now on."""
        if not self.is_gpu:
            total = machine.total_bytes()
            self.bytes = int(min(memory, total) if memory > 1 else memory * total)
            reset_peak()
            return
        total = torch.cuda.get_device_properties(self._device).total_memory
        mine = self._gpu_share * total
        self.bytes = int(min(memory, mine) if memory > 1 else memory * mine)
        # Beyond it the allocator raises out of memory, so two replicas on one device can't starve each other.
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.bytes / total), self._device)

    def used(self) -> int:
        """Bytes now: resident on a CPU, of tensors on a GPU."""
        return torch.cuda.memory_allocated(self._device) if self.is_gpu else resident_bytes()

    def reset_peak(self) -> None:
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_peak()

    def peak(self) -> int:
        """The most since `reset_peak`; on a GPU of what tensors held."""
        return torch.cuda.max_memory_allocated(self._device) if self.is_gpu else peak_bytes()

    def is_exceeded(self) -> bool:
        """Whether the process was over the budget for a moment since the last time this was asked, as a
        batch that is too large makes it; 1 us where it never was. What stays is no batch's fault: it is
        logged. A CPU only: a GPU's allocator raises by itself."""
        if self.is_gpu or _highest_bytes() <= self.bytes or peak_bytes() <= self.bytes:
            return False
        release_memory()
        reset_peak()
        if (used := resident_bytes()) > self.bytes:
            logger.warning("event=over_budget_at_rest used=%d budget=%d", used, self.bytes)
            return False
        return self._resets

    def check_fits(self) -> None:
        """Raise BudgetError where what is loaded is over the budget already."""
        if (used := self.used()) > self.bytes:
            raise BudgetError(
                f"memory: {self.bytes / 2**20:.0f} MiB are less than the {used / 2**20:.0f} MiB that the "
                "replica takes with its model loaded; raise it"
            )


def resident_bytes() -> int:
    """Of this process, where /proc tells; 0 elsewhere."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def peak_bytes() -> int:
    """The most that was resident since `reset_peak`, where /proc tells; 0 elsewhere. 40 us."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _highest_bytes() -> int:
    """No less than `peak_bytes`: what a process was born with counts, too. 1 us."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not ours
        pass


def release_memory() -> None:
    """After out of memory: give back what is free but held, so that the retry finds it in one piece."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # glibc keeps freed memory below a live block; this gives whole free pages back, wherever they lie.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl
        if trim is not None:
            trim(0)


def kv_bytes(device: str, *, gpu_share: float = 1.0, memory: float = 1.0) -> int:
    """Bytes for KV memory on `device` after the model was loaded. gpu_share: this replica's part of it.

    memory: its budget, as Budget takes it.
    """
    budget = Budget(device, memory, gpu_share)
    if budget.is_gpu:
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(GPU_SHARE * max(0.0, min(float(free), budget.bytes - budget.used())))
    return int(min(CPU_SHARE * machine.free_bytes(), max(0, budget.bytes - resident_bytes())))
