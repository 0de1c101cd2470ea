"""OpenAI's chat and completions, for applications whose model generates text.

Owns: POST /v1/chat/completions and /v1/completions, from the body to the last byte sent. Must not know:
tokens, steps, the model. Every way out of a request closes its generation: what it holds is free before
the next step.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from deployments.core.contract import OutputStream, TextService
from deployments.core.errors import ModelBroken
from deployments.core.generation import Delta, GenerationRequest
from serve_app.http.body import read_body
from serve_app.http.chat_fields import CommonFields
from serve_app.http.chat_request import (
    chat_generation,
    completion_generations,
    read_chat,
    read_completion,
)
from serve_app.http.exchange import Call, Handler, Reply
from serve_app.http.generation_reply import Batch, ChunkedReply, GenerationReply, Style
from serve_app.http.media import JSON_MEDIA, parse_content_type, unsupported
from serve_app.http.openai import Models
from serve_app.http.options import request_options
from serve_app.http.sending import WhileConnected
from serve_app.http.sse import send_events

CHAT_ROUTE = "/v1/chat/completions"
COMPLETIONS_ROUTE = "/v1/completions"


class Chat:
    """The handlers of a service whose card says `generates`."""

    def __init__(self, service: TextService) -> None:
        self._service = service
        self._models = Models(service)
        self._context_tokens = service.card.context_tokens

    def routes(self) -> dict[str, dict[str, Handler]]:
        return {CHAT_ROUTE: {"POST": self.chat}, COMPLETIONS_ROUTE: {"POST": self.completions}}

    async def chat(self, call: Call) -> Reply:
        body = await self._read(call)
        request = read_chat(body, context_tokens=self._context_tokens)
        self._models.check(request.model)
        asked = chat_generation(request, context_tokens=self._context_tokens)
        return await self._answer(call, request, [asked], Style.CHAT, body_bytes=len(body))

    async def completions(self, call: Call) -> Reply:
        body = await self._read(call)
        request = read_completion(body, context_tokens=self._context_tokens)
        self._models.check(request.model)
        asked = completion_generations(
            request,
            context_tokens=self._context_tokens,
            max_choices=self._service.limits.max_items_per_request,
        )
        return await self._answer(call, request, asked, Style.COMPLETION, body_bytes=len(body))

    async def _read(self, call: Call) -> bytes:
        media = parse_content_type(call.headers.get(b"content-type")).media
        if media != JSON_MEDIA:
            raise unsupported(media, (JSON_MEDIA,))
        return await read_body(call, self._service)

    async def _answer(
        self,
        call: Call,
        request: CommonFields,
        asked: Sequence[GenerationRequest],
        style: Style,
        *,
        body_bytes: int,
    ) -> Reply:
        options = request_options(call, timeout_ms=None, priority=0, body_bytes=body_bytes)
        with WhileConnected(call.receive), ExitStack() as held:
            generations = await self._service.generate(asked, options)
            for generation in generations:
                held.callback(generation.close)
            choices = [choice for generation in generations for choice in generation.choices]
            about: dict[str, Any] = {
                "request_id": call.request_id,
                "model": self._service.card.name,
                "prompt_tokens": [generation.prompt_tokens for generation in generations],
                "choices_each": asked[0].n,
                "top_logprobs": asked[0].sampling.top_logprobs,
            }
            if not request.stream:
                batches = [batch async for batch in as_they_come(choices)]
                return Reply(GenerationReply(style, **about).whole(batches))
            options_given = request.stream_options
            with_usage = options_given is not None and bool(options_given.include_usage)
            return await send_events(
                call,
                _events(ChunkedReply(style, with_usage=with_usage, **about), choices),
                route=CHAT_ROUTE if style is Style.CHAT else COMPLETIONS_ROUTE,
                timeout_s=self._service.limits.idle_timeout_s,
            )


async def _events(reply: ChunkedReply, choices: Sequence[OutputStream]) -> AsyncGenerator[bytes, None]:
    opening = reply.opening()
    async with aclosing(as_they_come(choices)) as batches:
        async for batch in batches:
            events = opening + reply.chunks(batch)
            opening = b""
            if events:
                yield events
    yield reply.closing()


async def as_they_come(choices: Sequence[OutputStream]) -> AsyncGenerator[Batch, None]:
    """What is ready of any choice, until all have finished; raises what ended one of them."""
    if len(choices) > 1:
        async with aclosing(_merged(choices)) as batches:
            async for batch in batches:
                yield batch
        return
    is_open = True
    while is_open:
        deltas = await _read(choices[0])
        yield ((0, deltas),)
        is_open = deltas[-1].finish_reason is None


_Ready = asyncio.Queue[tuple[int, Sequence[Delta]] | Exception]


async def _merged(choices: Sequence[OutputStream]) -> AsyncGenerator[Batch, None]:
    """All that is ready is one batch: a step of the engine gives every choice its token at once."""
    ready: _Ready = asyncio.Queue(len(choices))
    pumps = [asyncio.ensure_future(_pump(choice, i, ready)) for i, choice in enumerate(choices)]
    try:
        open_choices = len(choices)
        while open_choices:
            batch = [_taken(await ready.get())]
            while not ready.empty():
                batch.append(_taken(ready.get_nowait()))
            open_choices -= sum(deltas[-1].finish_reason is not None for _, deltas in batch)
            yield batch
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(choice: OutputStream, index: int, ready: _Ready) -> None:
    """Bounded: some of a choice waits in `ready`, the next in its own stream."""
    try:
        is_open = True
        while is_open:
            deltas = await _read(choice)
            await ready.put((index, deltas))
            is_open = deltas[-1].finish_reason is None
    except Exception as error:
        await ready.put(error)


def _taken(some: tuple[int, Sequence[Delta]] | Exception) -> tuple[int, Sequence[Delta]]:
    if isinstance(some, Exception):
        raise some
    return some


async def _read(choice: OutputStream) -> Sequence[Delta]:
    deltas: Sequence[Delta] = await choice.read()
    if not deltas:
        raise ModelBroken("the text ended without a reason")
    return deltas
