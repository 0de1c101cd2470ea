"""Sending an answer in pieces to a client that may be slow, or gone.

Owns: the longest wait for a client to take a piece, and noticing that it left. Must not know: what the
pieces say. ASGI: `send` returns once the server's buffer has room (uvicorn: below 64 KiB), and `receive`
gives "http.disconnect" once the body is read and the client gone.
"""

import asyncio
from types import TracebackType
from typing import Any

from starlette.types import Message, Receive, Send

from deployments.core.errors import ClientLeft


class _Interruption:
    """Cancels the block that it guards and turns that cancel, and no other, into ClientLeft.

    asyncio.timeout is not there in Python 3.10.
    """

    __slots__ = ("_fired", "_task")

    def __enter__(self) -> None:
        self._fired = False
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] = task

    def _fire(self) -> None:
        self._fired = True
        self._task.cancel()

    def _check(self, error: BaseException | None, says: str) -> None:
        """Raise ClientLeft in the place of our own cancel."""
        if not self._fired or not isinstance(error, asyncio.CancelledError):
            return
        # Somebody else's cancel that came at the same moment goes first (Python >= 3.11 counts them).
        uncancel = getattr(self._task, "uncancel", None)
        if uncancel is None or uncancel() == 0:
            raise ClientLeft(says) from None


class WhileConnected(_Interruption):
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.cancel()
        self._check(error, "the client left before its answer was complete")


class _SendLimit(_Interruption):
    __slots__ = ("_timeout_s", "_timer")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def __enter__(self) -> None:
        super().__enter__()
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._fire)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        self._check(error, f"the client took nothing for {self._timeout_s:g} s")


async def send_within(send: Send, message: Message, timeout_s: float) -> None:
    """`send`, or ClientLeft where the client takes nothing for `timeout_s` seconds.

    After that nothing more can be sent: leave, and the server closes the connection.
    """
    with _SendLimit(timeout_s):
        await send(message)
