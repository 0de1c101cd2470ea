"""What a body to POST /v1/chat/completions or /v1/completions asks of the model.

Owns: which fields go together, what OpenAI has and this server refuses. Must not know: tokenizers, how
answers look. Source: OpenAI's API reference, "Create chat completion" and "Create completion".
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from deployments.core.errors import ContextLengthExceeded, MalformedRequest, RequestTooLarge
from deployments.core.generation import GenerationRequest, Grammar, Sampling
from serve_app.http.chat_fields import (
    DEFAULTS,
    ChatRequest,
    CommonFields,
    CompletionRequest,
    JsonSchema,
    ResponseFormat,
    StreamOptions,
)
from serve_app.http.chat_messages import read_messages
from serve_app.http.jsonio import GC_OFF_FROM_BYTES, Shape, decode, too_many_items

MIN_ELEMENTS = 100_000
ELEMENTS_PER_TOKEN = 8
"""Of a body over 256 KiB, see _check_elements: 16 MiB of `"1":1,` under logit_bias took 5 s to decode on a
2-core machine, which no context has room for."""
MAX_SCHEMA_BYTES = 64 * 1024
COMPLETION_TOKENS = 16
"""OpenAI's `max_tokens` of a completion that names none; a chat then has the whole context."""


_OBJECTS: dict[str, type[msgspec.Struct]] = {
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "response_format.json_schema": JsonSchema,
}
_CHAT = msgspec.json.Decoder(ChatRequest)
_CHAT_SHAPE = Shape(ChatRequest, **_OBJECTS)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_COMPLETION_SHAPE = Shape(CompletionRequest, **_OBJECTS)


def read_chat(body: bytes, *, context_tokens: int) -> ChatRequest:
    _check_elements(body, context_tokens)
    return decode(_CHAT, _CHAT_SHAPE, body)


def read_completion(body: bytes, *, context_tokens: int) -> CompletionRequest:
    _check_elements(body, context_tokens)
    return decode(_COMPLETION, _COMPLETION_SHAPE, body)


def _check_elements(body: bytes, context_tokens: int) -> None:
    """Refuse a body that would stop every running stream while it is decoded: commas and brackets bound
    what is built. Those within a text count too, but a token holds no more than a few of them."""
    if len(body) < GC_OFF_FROM_BYTES:
        return
    limit = max(MIN_ELEMENTS, ELEMENTS_PER_TOKEN * context_tokens)
    if body.count(b",") + body.count(b"[") + body.count(b"{") > limit:
        raise RequestTooLarge(
            f"the body has over {limit} commas and brackets, more than fits the model's context;"
            " send fewer messages or prompts at once"
        )


def chat_generation(request: ChatRequest, *, context_tokens: int) -> GenerationRequest:
    """Raises MalformedRequest, RequestTooLarge, ContextLengthExceeded."""
    _refuse_unsupported(request)
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise MalformedRequest(
            "`max_tokens` and `max_completion_tokens` differ; send one of them", param="max_tokens"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise MalformedRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    return _generation(
        request,
        messages=read_messages(request.messages),
        max_tokens=next(iter(limits), None),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        context_tokens=context_tokens,
    )


def completion_generations(
    request: CompletionRequest, *, context_tokens: int, max_choices: int
) -> list[GenerationRequest]:
    """One for each prompt, in order. max_choices: of all prompts together."""
    _refuse_unsupported(request)
    prompts = _prompts(request.prompt)
    choices = len(prompts) * (request.n or 1)
    if choices > max_choices:
        raise too_many_items(choices, max_choices, param="prompt")
    max_tokens = request.max_tokens or min(COMPLETION_TOKENS, context_tokens or COMPLETION_TOKENS)
    return [
        _generation(
            request,
            prompt=prompt,
            max_tokens=max_tokens,
            top_logprobs=request.logprobs,
            context_tokens=context_tokens,
        )
        for prompt in prompts
    ]


def _generation(
    request: CommonFields,
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    context_tokens: int,
    **input: Any,
) -> GenerationRequest:
    if request.stream_options is not None and not request.stream:
        raise MalformedRequest("`stream_options` needs `stream: true`", param="stream_options")
    if max_tokens is not None and max_tokens > context_tokens > 0:
        raise ContextLengthExceeded(
            f"`max_tokens` is over the model's context of {context_tokens} tokens; ask for fewer",
            param="max_tokens",
        )
    stop = request.stop or ()
    return GenerationRequest(
        **input,
        max_tokens=max_tokens,
        n=request.n or 1,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        sampling=_sampling(request, top_logprobs),
        grammar=_grammar(request.response_format),
        ignore_eos=bool(request.ignore_eos),
    )


def _sampling(request: CommonFields, top_logprobs: int | None) -> Sampling:
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
    }
    return Sampling(
        **{name: value for name, value in given.items() if value is not None},
        top_k=max(0, request.top_k or 0),  # vLLM's -1 is "off" too
        logit_bias=_logit_bias(request.logit_bias or {}),
        seed=request.seed,
        top_logprobs=top_logprobs,
    )


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) <= 9):
            raise MalformedRequest(
                f"`logit_bias` has the key {token[:40]!r}; keys are token ids", param="logit_bias"
            )
    return {int(token): bias for token, bias in given.items()}


def _grammar(wanted: ResponseFormat | None) -> Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar('{"type": "object"}')
    if wanted.json_schema is None:
        raise MalformedRequest(
            "`response_format` of type json_schema needs `json_schema`: {name, schema}",
            param="response_format.json_schema",
        )
    return Grammar(_schema_text(bytes(wanted.json_schema.schema)))


def _schema_text(schema: bytes) -> str:
    param = "response_format.json_schema.schema"
    if len(schema) > MAX_SCHEMA_BYTES:
        raise MalformedRequest(
            f"the schema is {len(schema)} bytes of JSON; at most {MAX_SCHEMA_BYTES} are taken", param=param
        )
    if not schema.startswith(b"{"):
        raise MalformedRequest("the schema must be a JSON object", param=param)
    try:
        return schema.decode()
    except UnicodeDecodeError:
        raise MalformedRequest("the schema is not valid UTF-8", param=param) from None


def _prompts(value: Any) -> list[Any]:
    """The prompts of a request: texts, or lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(text, str) for text in value):
            return value
        if _is_tokens(value):
            return [value]
        if all(_is_tokens(tokens) for tokens in value):
            return value
    raise MalformedRequest(
        "`prompt` must be a string, a list of strings, a list of token ids or a list of such lists,"
        " none of the lists empty",
        param="prompt",
    )


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int and t >= 0 for t in value)


def _refuse_unsupported(request: CommonFields) -> None:
    for name, passing in DEFAULTS.items():
        value = getattr(request, name, None)
        if value is not None and not any(type(v) is type(value) and v == value for v in passing):
            raise MalformedRequest(
                f"`{name}` is not supported here: this server gives text, without tools; leave it out",
                param=name,
            )
