"""Sending an answer in pieces to a client that may be slow, or gone.

Owns: the longest wait for a client to take a piece, and noticing that it left. Must not know: what the
pieces say. ASGI: `send` returns once the server's buffer has room (uvicorn: below 64 KiB), and `receive`
gives "http.disconnect" once the body is read and the client gone.
"""

import asyncio

from starlette.types import Message, Receive, Send

from deployments.core.errors import ClientLeft
from serve_app.http.interruption import Interruption, TimeLimit


class WhileConnected(Interruption):
    """`with WhileConnected(receive):` raises ClientLeft inside as soon as the client has left.

    Only once the request's body has been read, and by one reader of `receive` at a time.
    """

    __slots__ = ("_receive", "_watch")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    def __enter__(self) -> None:
        super().__enter__()
        self._watch = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._fire()

    def _stop(self) -> None:
        self._watch.cancel()

    def _error(self) -> ClientLeft:
        return ClientLeft("the client left before its answer was complete")


async def send_within(send: Send, message: Message, timeout_s: float) -> None:
    """`send`, or ClientLeft where the client takes nothing for `timeout_s` seconds.

    After that nothing more can be sent: leave, and the server closes the connection.
    """
    with TimeLimit(timeout_s, ClientLeft, "the client took nothing"):
        await send(message)
