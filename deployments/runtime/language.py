"""What a replica asks of a language model: the seam between the service and deployments/models/llm.

Owns: the Protocol. Must not know: networks, tokenizers, Ray, HTTP.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from deployments.core.generation import Delta, GenerationRequest
from deployments.engine.sequence import Runner, Sequence


class LanguageModel(Protocol):
    """A model class with these members is served as a language model; others step (runtime/stepwise.py).

    context_tokens: prompt and output together. block_units: tokens of one KV block; block_bytes: its
    bytes, all layers. shares_blocks: blocks are pages that sequences share in place; otherwise each
    sequence has a row of its own and cached blocks are copied. All are known once `load` returned.
    """

    context_tokens: int
    block_units: int
    block_bytes: int
    shares_blocks: bool
    item_schema: Mapping[str, Any]  # of /predict's item and output
    output_schema: Mapping[str, Any]

    def load(self, device: str) -> None:
        """Read weights and tokenizer; model thread. Shows progress where it takes long."""
        ...

    def make_runner(self, *, slots: int, blocks: int) -> Runner:
        """Allocate KV memory for `blocks` blocks and `slots` sequences at once; model thread, once."""
        ...

    def prepare(self, request: GenerationRequest) -> list[Sequence]:
        """A sequence a choice, with payload, tokens, known and max_units set; any thread.

        Raises InvalidItem (param names the field) and ContextLengthExceeded.
        """
        ...

    def read_item(self, item: Any) -> GenerationRequest:
        """An item of /predict: a string, a list of messages, or an object with "messages" and options."""
        ...

    def examples(self) -> list[Any]:
        """A few items of /predict, for /docs."""
        ...

    def answer(self, sequence: Sequence, deltas: list[Delta]) -> Any:
        """The output of /predict: {"text", "finish_reason", "usage"}."""
        ...
