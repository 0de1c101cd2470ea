"""Messages to prompt text by the model's own chat template, and that text to token ids.

Owns: the template's environment (as transformers sets it up, without importing it: over a second), and that
special tokens come from the template alone: in a message they are text. Must not know: requests, limits.
Source: transformers, utils/chat_template_utils.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from deployments.core.errors import InvalidItem
from deployments.models.hub import read_json
from deployments.models.llm.text import encode

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Role of a message -> what the template is told (OpenAI's newer name for "system" is "developer")."""

_PRIVATE_USE = range(0xE000, 0xF900)


class ChatTemplate:
    """The chat format of the model in `folder`. Safe from any thread."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A second one, as the switch is the tokenizer's own state and requests come from many threads.
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder().items()
        self._ids = {token.content: index for index, token in added if token.special}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        file = folder / "tokenizer_config.json"
        config = read_json(file) if file.exists() else {}
        source = _find_source(folder, config)
        self._template = None if source is None else _make_environment().from_string(source)
        self._names = {name: text for name in config if (text := _token_text(name, config[name])) is not None}

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the prompt, up to where the assistant's answer begins.

        messages: not empty, each {"role", "content"}, roles of ROLES. Raises InvalidItem where the
        template refuses them.
        """
        chat = [{"role": ROLES[message["role"]], "content": message["content"]} for message in messages]
        if not any(self._special.search(message["content"]) for message in chat):
            return encode(self._tokenizer, self.render(chat), add_special_tokens=False)
        mark = _unused_character([message["content"] for message in chat])
        broken = [{**message, "content": self._break(message["content"], mark)} for message in chat]
        return self._encode_marked(self.render(broken), mark)

    def render(self, chat: Sequence[Mapping[str, str]]) -> str:
        """The prompt as text. Raises InvalidItem with the template's own words."""
        if self._template is None:
            raise InvalidItem("this model has no chat template: give a prompt", param="messages")
        try:
            return self._template.render(
                messages=chat, tools=None, documents=None, add_generation_prompt=True, **self._names
            )
        except jinja2.TemplateError as error:
            message = f"the model's chat template can't take these messages: {error}"
            raise InvalidItem(message, param="messages") from None

    def _break(self, text: str, mark: str) -> str:
        """`mark` behind the first character of each special token, so that it is none any more."""
        special = self._unmarked(mark)
        while special.search(text):  # again for those that overlapped
            text = special.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        return text

    def _unmarked(self, mark: str) -> re.Pattern[str]:
        """A special token without `mark` behind it: one of a single character can't be broken otherwise."""
        return re.compile(f"(?:{self._special.pattern})(?!{mark})")

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """The special tokens left in `text` are the template's; the rest is text once the marks are out."""
        ids: list[int] = []
        end = 0
        for found in [*self._unmarked(mark).finditer(text), None]:
            part = text[end : found.start() if found else len(text)].replace(mark, "")
            ids += encode(self._plain, part, add_special_tokens=False)
            if found:
                ids.append(self._ids[found[0]])
                end = found.end()
        return ids


def _find_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins; the entry of tokenizer_config.json may be a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = {one["name"]: one["template"] for one in entry}.get("default")
    return entry


def _token_text(name: str, value: Any) -> str | None:
    """Text of bos_token, eos_token and so on: templates write them by name."""
    if not name.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _unused_character(texts: Sequence[str]) -> str:
    used = set().union(*texts)
    unused = next((code for code in _PRIVATE_USE if chr(code) not in used), None)
    if unused is None:
        raise InvalidItem("the messages hold every private-use character of Unicode", param="messages")
    return chr(unused)


def _make_environment() -> ImmutableSandboxedEnvironment:
    """What templates on the Hub are written for; a template comes with a model, so it may run no code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
