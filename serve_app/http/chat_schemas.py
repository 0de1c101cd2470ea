"""JSON Schemas of OpenAI's chat and completions, as far as a schema can say it.

Owns: the shapes that openapi.py puts under /v1. Must not know: statuses. Ranges come from the structs
that read the requests; what a struct leaves to code (messages, prompts, what is not supported) is here.
"""

from typing import Any

import msgspec

from deployments.core.contract import Limits, ModelCard
from serve_app.http.chat_fields import DEFAULTS, ChatRequest, CompletionRequest
from serve_app.http.chat_messages import EMPTY, MAX_MESSAGES, ROLES
from serve_app.http.schemas import INTEGER, NUMBER, STRING, Schema, array, closed, record

_NULL: Schema = {"type": "null"}
_TOKEN: Schema = {"type": "integer", "minimum": 0}
_REASON: Schema = {"enum": ["stop", "length"]}
_LOGPROB = {"token": STRING, "logprob": NUMBER, "bytes": array(INTEGER)}
_USAGE = record(
    {
        "prompt_tokens": INTEGER,
        "completion_tokens": INTEGER,
        "total_tokens": INTEGER,
        "prompt_tokens_details": record({"cached_tokens": INTEGER}),
    }
)


def chat_request(card: ModelCard) -> Schema:
    part = record({"type": {"const": "text"}, "text": STRING})
    content = {"anyOf": [STRING, array(part)]}
    besides: Schema = {"name": {"type": ["string", "null"]}} | {key: {"enum": [None, []]} for key in EMPTY}
    roles = {"enum": [role for role in ROLES if role != "assistant"]}
    asks = closed({"role": roles, "content": content, **besides}, "role", "content")
    role = {"const": "assistant"}
    said = closed({"role": role, "content": {"anyOf": [content, _NULL]}, **besides}, "role")
    messages = array({"anyOf": [asks, said]}, minItems=1, maxItems=MAX_MESSAGES)
    messages["examples"] = [[{"role": "user", "content": "What is the capital of France?"}]]
    return _request(ChatRequest, card, messages=messages)


def completion_request(card: ModelCard, limits: Limits) -> Schema:
    most = limits.max_items_per_request
    tokens = array(_TOKEN, minItems=1)
    prompt: Schema = {
        "anyOf": [
            STRING,
            array(STRING, minItems=1, maxItems=most),
            tokens,
            array(tokens, minItems=1, maxItems=most),
        ],
        "examples": ["The capital of France is"],
    }
    return _request(CompletionRequest, card, prompt=prompt)


def _request(kind: type[msgspec.Struct], card: ModelCard, **fields: Schema) -> Schema:
    """The schema of a struct, with these fields in the place of its own."""
    _, parts = msgspec.json.schema_components([kind], ref_template="{name}")
    schema: Schema = _inlined(parts[kind.__name__], parts)
    fields["model"] = {"const": card.name}
    fields["logit_bias"] = schema["properties"]["logit_bias"]
    fields["logit_bias"]["anyOf"][0]["propertyNames"] = {"pattern": "^[0-9]{1,9}$"}
    for name in schema["properties"].keys() & DEFAULTS.keys():
        fields[name] = {"enum": [None, *DEFAULTS[name]], "description": "Not supported."}
    for name in schema["properties"].keys() & {"max_tokens", "max_completion_tokens"}:
        limit = {"maximum": card.context_tokens} if card.context_tokens else {}
        fields[name] = {"type": ["integer", "null"], "minimum": 1, **limit}
    return schema | {"properties": schema["properties"] | fields}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """Without references: the document has no place of its own for them."""
    if isinstance(schema, list):
        return [_inlined(value, parts) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"]], parts)
    return {key: _inlined(value, parts) for key, value in schema.items()}


def chat_answer() -> Schema:
    top = record(_LOGPROB)
    token = record({**_LOGPROB, "top_logprobs": array(top)})
    logprobs = record({"content": array(token), "refusal": _NULL})
    message = record({"role": {"const": "assistant"}, "content": STRING, "refusal": _NULL})
    return _answer("chat.completion", logprobs, message=message)


def completion_answer() -> Schema:
    tops = array({"type": "object", "additionalProperties": NUMBER})
    logprobs = record(
        {
            "tokens": array(STRING),
            "token_logprobs": array(NUMBER),
            "top_logprobs": {"anyOf": [tops, _NULL]},
            "text_offset": array(INTEGER),
        }
    )
    return _answer("text_completion", logprobs, text=STRING)


def _answer(name: str, logprobs: Schema, **content: Schema) -> Schema:
    choice = record(
        {
            "index": INTEGER,
            **content,
            "logprobs": {"anyOf": [logprobs, _NULL]},
            "finish_reason": _REASON,
        }
    )
    return record(
        {
            "id": STRING,
            "object": {"const": name},
            "created": INTEGER,
            "model": STRING,
            "choices": array(choice),
            "usage": _USAGE,
        }
    )
