"""Requests to sequences: what needs the tokenizer is checked and done here, before anything is queued.

Owns: encoding, the context's length, token ids in range, schemas, seeds. Must not know: networks, KV memory,
HTTP. Source: OpenAI's API reference for messages about the context's length.
"""

import random
from collections.abc import Sequence as Values
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deployments.core.errors import ContextLengthExceeded, InvalidItem
from deployments.core.generation import GenerationRequest
from deployments.engine.sequence import Sequence
from deployments.models.hub import read_json
from deployments.models.llm.choice import Choice, Ending, Vocabulary
from deployments.models.llm.grammar import GrammarCompiler
from deployments.models.llm.template import ROLES, ChatTemplate
from deployments.models.llm.text import encode


class FrontEnd:
    """Everything of the model in `folder` that is text. vocab_size: of the logits. Safe from any thread."""

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
        self.context_tokens = int(config["max_position_embeddings"])
        self.vocab_size = int(config["vocab_size"])
        self._tokenizer = _read_tokenizer(folder)
        self.eos = _find_eos(folder, config, self._tokenizer)
        self._template = ChatTemplate(folder, self._tokenizer)
        self._vocabulary = Vocabulary(self._tokenizer)
        self._grammars = GrammarCompiler(self._tokenizer, self.vocab_size, sorted(self.eos))
        # A text of more characters can't fit; to encode one takes a second or two a megabyte.
        self._max_chars = self.context_tokens * max(map(len, self._tokenizer.get_vocab()))

    def prepare(self, request: GenerationRequest) -> list[Sequence]:
        """One sequence a choice. Raises InvalidItem and ContextLengthExceeded."""
        prompt = self._encode(request)
        max_tokens = self._room(len(prompt), request)
        self._check_bias(request)
        matcher = self._grammars.compile(request.grammar.json_schema) if request.grammar else None
        eos = frozenset[int]() if request.ignore_eos else self.eos
        ending = Ending(max_tokens, request.stop, eos)
        seed = request.sampling.seed
        return [
            Sequence(
                payload=Choice(
                    self._vocabulary,
                    prompt,
                    sampling=request.sampling,
                    ending=ending,
                    seed=random.getrandbits(64) if seed is None else seed + index,
                    matcher=matcher.copy() if matcher else None,
                ),
                tokens=list(prompt),
                known=len(prompt),
                max_units=len(prompt) + max_tokens,
            )
            for index in range(request.n)
        ]

    def _encode(self, request: GenerationRequest) -> list[int]:
        if request.messages is not None:
            return self._encode_messages(request.messages)
        if isinstance(request.prompt, str):
            self._check_text(request.prompt, "prompt")
            ids = encode(self._tokenizer, request.prompt, add_special_tokens=True)
        else:
            ids = list(request.prompt or ())
        wrong = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise InvalidItem(f"token ids go from 0 to {self.vocab_size - 1}, got {wrong}", param="prompt")
        if not ids:
            raise InvalidItem("the prompt is empty", param="prompt")
        return ids

    def _encode_messages(self, messages: Values[Any]) -> list[int]:
        if not messages:
            raise InvalidItem("at least one message is needed", param="messages")
        if len(messages) > self.context_tokens:
            raise self._too_long("messages", f"more than {len(messages)}")
        for index, message in enumerate(messages):
            _check_message(message, f"messages[{index}]")
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        for index, message in enumerate(messages):
            self._check_text(message["content"], f"messages[{index}].content")
        return self._template.encode(messages)

    def _check_text(self, text: str, param: str) -> None:
        self._check_length(len(text), param)
        try:
            text.encode()
        except UnicodeEncodeError:
            message = "the text holds a lone surrogate, half of a character: not valid"
            raise InvalidItem(message, param=param) from None

    def _check_length(self, chars: int, param: str) -> None:
        if chars > self._max_chars:
            raise self._too_long(param, f"far more, in {chars} characters")

    def _too_long(self, param: str, found: str) -> ContextLengthExceeded:
        name = "messages" if param.startswith("messages") else "prompt"
        return ContextLengthExceeded(
            f"This model's maximum context length is {self.context_tokens} tokens. However, your {name} "
            f"resulted in {found} tokens. Please reduce the length of the {name}.",
            param=param,
        )

    def _room(self, prompt: int, request: GenerationRequest) -> int:
        """Tokens that may be generated, at least 1."""
        param = "prompt" if request.messages is None else "messages"
        room = self.context_tokens - prompt
        if room < 1:
            raise self._too_long(param, str(prompt))
        if request.max_tokens is None:
            return room
        if request.max_tokens < 1:
            raise InvalidItem("max_tokens must be at least 1", param="max_tokens")
        if request.max_tokens > room:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.context_tokens} tokens. However, you "
                f"requested {prompt + request.max_tokens} tokens ({prompt} in the {param}, "
                f"{request.max_tokens} in the completion). Please reduce the length of the {param} or "
                "completion.",
                param="max_tokens",
            )
        return request.max_tokens

    def _check_bias(self, request: GenerationRequest) -> None:
        for token in request.sampling.logit_bias:
            if not 0 <= token < self.vocab_size:
                message = f"token ids go from 0 to {self.vocab_size - 1}, got {token}"
                raise InvalidItem(message, param="logit_bias")


def _check_message(message: Any, param: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InvalidItem('a message is an object with "role" and "content"', param=param)
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidItem(f"unknown role {role!r:.100}: one of {', '.join(ROLES)}", param=f"{param}.role")
    if not isinstance(content, str):
        raise InvalidItem("the content of a message is a string", param=f"{param}.content")


def _read_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"the model's folder has no tokenizer.json ({file})")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _find_eos(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a text: of generation_config.json, config.json, else the tokenizer's own end token."""
    file = folder / "generation_config.json"
    found = (read_json(file) if file.exists() else {}).get("eos_token_id", config.get("eos_token_id"))
    if found is None:
        file = folder / "tokenizer_config.json"
        token = (read_json(file) if file.exists() else {}).get("eos_token")
        found = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
    if found is None:
        raise ValueError("the model names no end token (eos_token_id): texts would never end")
    return frozenset(found if isinstance(found, list) else [found])
