"""A client of token streams (server-sent events): when each piece came, and clients that vanish.

Owns: the requests under way, arrival times, the text. Must not know: what is measured with them. It runs
in a process of its own (`listen`). Events are as OpenAI's completions have them: text in
`choices[0].text`, counts in `usage`, `[DONE]` at the end.
"""

import asyncio
import json
import multiprocessing
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PATIENCE_S = 900.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One streamed request. leave_s: the client is gone so long after it was sent, whatever came."""

    path: str
    body: bytes
    at_s: float = 0.0
    leave_s: float | None = None
    tag: str = ""


@dataclass(slots=True)
class Heard:
    """What came of it. Times are seconds since the first request's clock began; times_s: of pieces of text.

    status 0: the client left before an answer. tokens: as the server counted them, 0 where it said nothing.
    """

    tag: str
    sent_s: float
    status: int = 0
    times_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    text: str = ""
    tokens: int = 0
    has_left: bool = False
    error: str = ""

    @property
    def first_s(self) -> float:
        """Time to the first piece. ValueError where none came."""
        if not self.times_s:
            raise ValueError(f"no text came: status {self.status} {self.error}")
        return self.times_s[0] - self.sent_s


def listen(port: int, asks: Sequence[Ask]) -> list[Heard]:
    """Carry the requests out in a process of its own; answers in the order of `asks`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(listen_here, port, asks).result()


def listen_here(port: int, asks: Sequence[Ask]) -> list[Heard]:
    return asyncio.run(_listen(port, asks))


async def _listen(port: int, asks: Sequence[Ask]) -> list[Heard]:
    loop = asyncio.get_running_loop()
    limits = aiohttp.TCPConnector(limit=0, force_close=True)  # one connection each, as of so many clients
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{port}", connector=limits, timeout=timeout
    ) as session:
        began_s = loop.time()
        return list(await asyncio.gather(*(_follow(session, ask, began_s) for ask in asks)))


async def _follow(session: aiohttp.ClientSession, ask: Ask, began_s: float) -> Heard:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, began_s + ask.at_s - loop.time()))
    heard = Heard(ask.tag, loop.time() - began_s)
    reading = asyncio.ensure_future(_read(session, ask, heard, began_s))
    _, unfinished = await asyncio.wait([reading], timeout=ask.leave_s)
    if unfinished:
        reading.cancel()  # closes the connection, in whatever state
        await asyncio.wait([reading])
        heard.has_left = True
    elif (error := reading.exception()) is not None:
        heard.error = repr(error)
    heard.end_s = loop.time() - began_s
    return heard


async def _read(session: aiohttp.ClientSession, ask: Ask, heard: Heard, began_s: float) -> None:
    loop = asyncio.get_running_loop()
    # Ours must not refuse, after its default of 30 s, what another server would keep waiting.
    headers = {"Content-Type": "application/json", "X-Request-Timeout-Ms": "600000"}
    async with session.post(ask.path, data=ask.body, headers=headers) as answer:
        heard.status = answer.status
        if answer.status != 200:
            heard.error = (await answer.text())[:500]
            return
        async for event in _events(answer.content):
            if "error" in event:
                heard.error = json.dumps(event["error"])[:500]
            if event.get("usage"):
                heard.tokens = event["usage"]["completion_tokens"]
            text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
            if text:
                heard.times_s.append(loop.time() - began_s)
                heard.text += text


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    async for line in content:
        if line.startswith(b"data: {"):
            yield json.loads(line[len(b"data: ") :])
