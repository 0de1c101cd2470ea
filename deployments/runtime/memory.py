"""How much memory there is for keys and values.

Owns: reading what is free on the device and the share taken of it. Must not know: models, blocks.
"""

import os
from pathlib import Path

import torch

CPU_SHARE = 0.25
"""Of the memory that is free at start. A CPU's memory belongs to other replicas and programs as well, and
what is not written costs nothing."""
GPU_SHARE = 0.9
"""Of what is left of this replica's share of the GPU after the weights; activations need the rest."""


def kv_bytes(device: str, *, gpu_share: float = 1.0) -> int:
    """Bytes for KV memory on `device` after the model was loaded. gpu_share: this replica's part of it."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(torch.device(device))
        mine = gpu_share * total - torch.cuda.memory_reserved(torch.device(device))
        return int(GPU_SHARE * max(0.0, min(float(free), mine)))
    return int(CPU_SHARE * _free_cpu_bytes())


def _free_cpu_bytes() -> int:
    """What Linux says is available, within the limit of a container; elsewhere what is free."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)
