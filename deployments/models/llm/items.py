"""Items of /predict for a language model: JSON values to requests, and what is answered.

Owns: their fields, ranges and defaults. Must not know: tokenizers, HTTP; the OpenAI routes have their own
reader. Source: CONTRACT, "chat's item is a string or a list of messages".
"""

from typing import Any

from deployments.core.errors import InvalidItem
from deployments.core.generation import Delta, GenerationRequest, Sampling

DEFAULT_TOKENS = 256
"""The caller of /predict waits for the whole text: not for all that the context has room for."""

MAX_STOPS, MAX_STOP_CHARS = 16, 1024

_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
        "required": ["role", "content"],
    },
}
_TEXT = {"type": "string", "minLength": 1}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_FIELDS = {
    "messages": _MESSAGES,
    "prompt": _TEXT,
    "max_tokens": {"type": "integer", "minimum": 1, "default": DEFAULT_TOKENS},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "seed": {"type": "integer"},
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]},
}
ITEM_SCHEMA: dict[str, Any] = {
    "anyOf": [_TEXT, _MESSAGES, {"type": "object", "properties": _FIELDS, "additionalProperties": False}]
}
_COUNT = {"type": "integer", "minimum": 0}
OUTPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "finish_reason": {"enum": ["stop", "length"]},
        "usage": {
            "type": "object",
            "properties": dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
        },
    },
    "required": ["text", "finish_reason", "usage"],
}


def read_item(item: Any) -> GenerationRequest:
    """A string (or its UTF-8 bytes) is one message of a user. Raises InvalidItem, param: the field."""
    if isinstance(item, bytes):
        item = _decode(item)
    if isinstance(item, str):
        if not item:
            raise InvalidItem("the text is empty")
        item = [{"role": "user", "content": item}]
    if isinstance(item, list):
        item = {"messages": item}
    if not isinstance(item, dict):
        raise InvalidItem('expected a string, a list of messages, or an object with "messages"')
    unknown = [key for key in item if key not in _FIELDS]
    if unknown:
        raise InvalidItem(f"unknown field {unknown[0]!r:.100}: there are {', '.join(_FIELDS)}")
    messages, prompt = item.get("messages"), item.get("prompt")
    if (messages is None) == (prompt is None):
        raise InvalidItem('give either "messages" or "prompt"')
    if messages is not None and not isinstance(messages, list):
        raise InvalidItem("expected a list of messages", param="messages")
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidItem("expected a string", param="prompt")
    return GenerationRequest(
        messages=messages,
        prompt=prompt,
        max_tokens=_read_integer(item, "max_tokens", DEFAULT_TOKENS, least=1),
        stop=_read_stop(item.get("stop")),
        sampling=_read_sampling(item),
    )


def make_answer(prompt_tokens: int, deltas: list[Delta]) -> dict[str, Any]:
    """The output, of all deltas of a choice in order (at least one)."""
    last = deltas[-1]
    return {
        "text": "".join(delta.text for delta in deltas),
        "finish_reason": last.finish_reason.value if last.finish_reason else None,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": last.tokens,
            "total_tokens": prompt_tokens + last.tokens,
        },
    }


def _read_sampling(item: dict[str, Any]) -> Sampling:
    # Without one, the most probable text: an item has one answer, as any other model's has.
    temperature = _read_number({"temperature": 0.0, **item}, "temperature", 0.0, 2.0)
    top_p = _read_number(item, "top_p", 0.0, 1.0)
    if top_p == 0:
        raise InvalidItem("top_p must be over 0", param="top_p")
    return Sampling(temperature=temperature, top_p=top_p, seed=_read_integer(item, "seed", None))


def _read_number(item: dict[str, Any], name: str, least: float, most: float) -> float:
    """1 where it is absent: the default of both."""
    value = item.get(name, 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InvalidItem(f"{name} must be a number from {least:g} to {most:g}", param=name)
    return float(value)


def _read_integer(
    item: dict[str, Any], name: str, default: int | None, least: int | None = None
) -> int | None:
    value = item.get(name, default)
    if value is None and default is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number from {least} on"
        raise InvalidItem(f"{name} must be {wanted}", param=name)
    return value


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise InvalidItem(f"stop must be a string or a list of at most {MAX_STOPS}", param="stop")
    if not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidItem(f"a stop string has 1 to {MAX_STOP_CHARS} characters", param="stop")
    return tuple(stops)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidItem("the text is not valid UTF-8") from None
