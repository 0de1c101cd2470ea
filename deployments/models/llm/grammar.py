"""A JSON Schema that the text must follow: compiled once a request, one matcher a choice.

Owns: what schemas are taken, llguidance's limits and its error states. Must not know: logits' values,
requests. Source: llguidance (guidance-ai), docs/json_schema.md.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from deployments.core.errors import InvalidItem

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA_BYTES = 64 * 1024
KEPT_SCHEMAS = 16
"""Clients send the same schema with every request."""
MAX_DEPTH = 64
"""Nesting of a schema: llguidance compiles by recursion, and a stack that overflows ends the process."""

_PARAM = "response_format"
# As json.dumps writes. With free white space small models go on with blanks for ever.
_FORM: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """Follows one text through its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> "Matcher":
        """An independent one in the same state."""
        return Matcher(self._matcher.deep_copy())

    def fill(self, bits: torch.Tensor) -> bool:
        """Set the bits of the tokens that may come next, in int32 [ceil(V / 32)]; False: there is none."""
        try:
            self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * 4)
        except ValueError:
            return False
        return bool(bits.any())

    def accept(self, token: int) -> bool:
        """Go on by `token`. True: the text is complete. Raises InvalidItem where it can't go on."""
        if not self._matcher.consume_token(token):
            raise self.dead_end()
        return bool(self._matcher.is_stopped())

    def dead_end(self) -> InvalidItem:
        reason = _first_line(self._matcher.get_error()) or "no token may follow"
        return InvalidItem(f"the text can't go on within the schema ({reason}); simplify it", param=_PARAM)


class GrammarCompiler:
    """Schemas to matchers, for one tokenizer. vocab_size: of the logits. Safe from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        # 0.6 s; the slices are llguidance's own for JSON.
        self._tokenizer = LLTokenizer(
            tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(eos), slices=LLTokenizer.json_slices()
        )
        self._words = (vocab_size + 31) // 32
        self._limits = LLParserLimits(verbose_errors=False)
        self._compiled = lru_cache(KEPT_SCHEMAS)(self._compile)

    def compile(self, schema: str) -> Matcher:
        """Raises InvalidItem: not JSON, too big, not understood, or nothing satisfies it. 1 ms to 1 s at
        its first time."""
        return self._compiled(schema).copy()

    def _compile(self, schema: str) -> Matcher:
        _check(schema)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_FORM)
        except ValueError as error:
            raise InvalidItem(f"the schema can't be used: {error}", param=_PARAM) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InvalidItem(f"the schema can't be used: {_first_line(matcher.get_error())}", param=_PARAM)
        # The first mask builds the lexer (6 ms): here, not on the model's thread.
        if not Matcher(matcher).fill(torch.zeros(self._words, dtype=torch.int32)):
            raise InvalidItem("no text satisfies the schema", param=_PARAM)
        return Matcher(matcher)


def forbid(logits: torch.Tensor, rows: Sequence[int], matchers: Sequence[Matcher]) -> list[int]:
    """-inf for every token of logits [N, V] that the row's matcher forbids; the rows where it forbids all."""
    vocab = logits.shape[1]
    bits = torch.zeros((len(rows), (vocab + 31) // 32), dtype=torch.int32)
    dead = [row for row, own, matcher in zip(rows, bits, matchers, strict=True) if not matcher.fill(own)]
    allowed = np.unpackbits(bits.numpy().view(np.uint8), axis=1, bitorder="little")[:, :vocab]
    forbidden = torch.from_numpy(allowed == 0).to(logits.device)
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill(forbidden, -torch.inf)
    return dead


def _check(schema: str) -> None:
    try:
        if len(schema.encode()) > MAX_SCHEMA_BYTES:
            raise InvalidItem(f"the schema is over {MAX_SCHEMA_BYTES // 1024} KiB", param=_PARAM)
        value = json.loads(schema)
        depth = _depth(value)
    except ValueError as error:
        raise InvalidItem(f"the schema is not JSON: {error}", param=_PARAM) from None
    except RecursionError:
        depth = MAX_DEPTH + 1
    if depth > MAX_DEPTH:
        raise InvalidItem(f"the schema is nested deeper than {MAX_DEPTH} levels", param=_PARAM)
    if not isinstance(value, dict):
        raise InvalidItem("the schema must be an object", param=_PARAM)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _first_line(message: str) -> str:
    return message.strip().split("\n")[0][:300]
