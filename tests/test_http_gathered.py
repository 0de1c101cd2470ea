"""Messages of one turn of the event loop leave in one write, in order, and all of them before the close."""

import asyncio

from serve_app.http.gathered import MOST_BYTES, GatheredWrites


class Recorded(asyncio.Transport):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bytes | str] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.calls.append(bytes(data))

    def close(self) -> None:
        self.calls.append("close")

    def is_closing(self) -> bool:
        return "close" in self.calls


async def test_what_is_written_in_one_turn_is_one_write() -> None:
    transport = Recorded()
    gathered = GatheredWrites(transport, asyncio.get_running_loop())
    for part in (b"a", b"b", b"c"):
        gathered.write(part)
    assert transport.calls == []
    await asyncio.sleep(0)
    assert transport.calls == [b"abc"]
    gathered.write(b"d")
    await asyncio.sleep(0)
    assert transport.calls == [b"abc", b"d"]


async def test_more_than_the_bound_does_not_wait_for_the_turn_to_end() -> None:
    transport = Recorded()
    gathered = GatheredWrites(transport, asyncio.get_running_loop())
    gathered.write(b"x" * (MOST_BYTES - 1))
    assert transport.calls == []
    gathered.write(b"y")
    assert len(transport.calls) == 1
    gathered.write(b"z")
    await asyncio.sleep(0)
    assert transport.calls[1:] == [b"z"]


async def test_close_comes_behind_what_was_written() -> None:
    transport = Recorded()
    gathered = GatheredWrites(transport, asyncio.get_running_loop())
    gathered.write(b"last")
    gathered.close()
    await asyncio.sleep(0)
    assert transport.calls == [b"last", "close"]
    assert gathered.is_closing()
