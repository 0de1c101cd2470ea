"""The `messages` of a chat: from what OpenAI's clients send to role and text.

Owns: roles, the forms of `content`, what a message may hold besides. Must not know: chat templates.
Source: OpenAI's API reference, "Create chat completion", messages.
"""

from collections.abc import Sequence
from typing import Any

from deployments.core.errors import MalformedRequest, RequestTooLarge

MAX_MESSAGES = 4096
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""developer is OpenAI's newer name of system; chat templates know the older one."""
TOOL_ROLES = ("tool", "function")
EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls")
"""What an answer of ours has, sent back as it came, are nulls or empty lists under these names."""


def read_messages(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Role and text of each. Raises MalformedRequest with the place, RequestTooLarge."""
    if not messages:
        raise MalformedRequest("`messages` is empty; send at least one", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestTooLarge(
            f"`messages` has over {MAX_MESSAGES} messages; leave out the oldest", param="messages"
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise MalformedRequest(f"`{place}` must be an object with role and content", param=place)
    role = _role(message.get("role"), f"{place}.role")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    _check_others(message, place)
    return {"role": role, "content": _text(content, f"{place}.content")}


def _role(role: Any, place: str) -> str:
    if isinstance(role, str):
        if role in ROLES:
            return ROLES[role]
        if role in TOOL_ROLES:
            raise MalformedRequest(f"`{place}`: tools are not supported here", param=place)
    raise MalformedRequest(f"`{place}` must be one of {', '.join(ROLES)}", param=place)


def _check_others(message: dict[str, Any], place: str) -> None:
    for name, value in message.items():
        if name in ("role", "content"):
            continue
        where = f"{place}.{name[:60]}"
        if name == "name":
            if value is not None and not isinstance(value, str):
                raise MalformedRequest(f"`{where}` must be a string", param=where)
        elif name not in EMPTY:
            raise MalformedRequest(
                f"unknown field {name[:60]!r} in `{place}`; allowed: role, content, name", param=where
            )
        elif value is not None and value != []:
            raise MalformedRequest(f"`{where}` is not supported here; leave it out", param=where)


def _text(content: Any, place: str) -> str:
    """A string, or the texts of all parts one behind the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MalformedRequest(f"`{place}` must be a string or a list of text parts", param=place)
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise MalformedRequest(f'`{place}` must be {{"type": "text", "text": "..."}}', param=place)
    if part["type"] != "text":
        raise MalformedRequest(
            f"`{place}` is of type {part['type'][:40]!r}: this model reads text only", param=f"{place}.type"
        )
    text = part.get("text")
    if len(part) != 2 or not isinstance(text, str):
        raise MalformedRequest(
            f"`{place}` must have a string under `text`, and nothing besides", param=f"{place}.text"
        )
    return text
