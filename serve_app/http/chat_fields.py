"""The fields of POST /v1/chat/completions and /v1/completions, with their ranges.

Owns: names, types, bounds; openapi.json is made from them. Must not know: what they mean to a model.
Sources: OpenAI's API reference, "Create chat completion" and "Create completion"; the names that it
lacks (top_k, min_p, repetition_penalty, ignore_eos) are vLLM's.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
MaxTokens = Annotated[int, Meta(ge=1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """include_obfuscation is taken and not used."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Struct, forbid_unknown_fields=True):
    """`schema` stays the text that came; name, description and strict are taken and not used: the text
    always follows the schema."""

    name: str
    schema: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CommonFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both routes take. null is the same as nothing. Those after `ignore_eos` are not used."""

    model: str
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(CommonFields, forbid_unknown_fields=True, kw_only=True):
    messages: list[Any]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None


class CompletionRequest(CommonFields, forbid_unknown_fields=True, kw_only=True):
    prompt: Any
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: Any = None
    suffix: Any = None
    best_of: Any = None


DEFAULTS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields of OpenAI's that are not offered, with the values besides null that ask for nothing."""
