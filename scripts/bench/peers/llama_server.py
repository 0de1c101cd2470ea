"""llama.cpp's server with the same weights in f32: where it is, how it is started.

Owns: its settings. docs/benchmarks/README.md tells how to build it. Flash attention, KV memory in f16 and
continuous batching are its defaults and stay; 16 slots of 512 tokens hold the mix.
"""

import os
from pathlib import Path

from scripts.bench.chat import SLOTS
from scripts.bench.processes import free_port
from scripts.bench.server import Spawned

SERVER, MODEL = "BRIMFUL_LLAMA_SERVER", "BRIMFUL_LLAMA_MODEL"
PATH = "/v1/completions"
SLOT_TOKENS = 512
HOW = "docs/benchmarks/README.md tells how to build it"


def find() -> tuple[Path, Path] | str:
    """(server, f32 GGUF) from the environment; else what is missing, for the reader."""
    found = []
    for name, what in ((SERVER, "llama.cpp's llama-server"), (MODEL, "the f32 GGUF file")):
        value = os.environ.get(name)
        if not value:
            return f"{name} is not set to {what}; {HOW}"
        if not Path(value).is_file():
            return f"{name}: no such file: {value}; {HOW}"
        found.append(Path(value))
    return found[0], found[1]


class LlamaServer(Spawned):
    def __init__(self, server: Path, model: Path) -> None:
        port, cores = free_port(), len(os.sched_getaffinity(0))
        options = {
            "--model": model,
            "--port": port,
            "--host": "127.0.0.1",
            "--parallel": SLOTS,
            "--ctx-size": SLOTS * SLOT_TOKENS,
            "--threads": cores,
            "--threads-batch": cores,
            "--cache-ram": 0,  # of prompts; the mix has none twice
        }
        words = [str(word) for pair in options.items() for word in pair]
        super().__init__([str(server), *words, "--no-webui", "--no-slots"], port=port)

    def is_ready(self) -> bool:
        return self.get("/health")[0] == 200
