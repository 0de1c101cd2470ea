"""POST /stream and /ws over a real server: full duplex, back-pressure, time-outs, every kind of end."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close

from deployments.core import errors
from deployments.core.contract import Limits, Streams
from serve_app.http import body
from serve_app.http import streams as streams_module
from serve_app.http.app import make_app
from serve_app.http.body import IN_HAND
from serve_app.http.front import OwnWatch, middlewares
from serve_app.http.websockets import close_code_of
from tests.stream_fakes import CHUNK, FakeStreamingService, chunk

LIMITS = Limits(max_streams=256, max_body_bytes=1 << 20)


class Server:
    """A service behind uvicorn on a free port."""

    def __init__(self, service: FakeStreamingService, port: int) -> None:
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def ws(self, **options: Any) -> connect:
        url = f"ws://127.0.0.1:{self.port}/ws"
        return connect(url, compression=None, max_size=None, proxy=None, **options)

    async def counted(self, *expected: tuple[int, str]) -> None:
        """Wait until just these outcomes are counted and every stream is closed."""
        await until(lambda: len(self.service.counted) >= len(expected) and not self.service.open)
        assert sorted(self.service.counted) == sorted(expected)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


@asynccontextmanager
async def serving(
    streams: Streams = Streams.CHUNKS, limits: Limits = LIMITS, **options: Any
) -> AsyncIterator[Server]:
    """Serve until the block ends; then no stream may be open and no task of ours be left."""
    before = asyncio.all_tasks()
    service = FakeStreamingService(streams, limits)
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(service, adds_request_id=True)
    config = uvicorn.Config(app, log_config=None, lifespan="off", loop="none", **options)
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    yield Server(service, listener.getsockname()[1])
    server.force_exit = True
    server.should_exit = True
    await task
    assert not service.open
    assert IN_HAND.bytes == 0
    await until(lambda: asyncio.all_tasks() <= before)


class RawClient:
    """HTTP by hand: sends a chunked body and reads the answer at the same time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def start(self, head: str = "Transfer-Encoding: chunked", method: str = "POST") -> None:
        self.writer.write(f"{method} /stream HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        await self.writer.drain()

    async def send(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.writer.drain()

    async def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def piece(self) -> bytes:
        """One chunk of the answer; empty: its end."""
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def lines(self) -> list[Any]:
        return [json.loads(line) for line in (await self.piece()).splitlines()]


@asynccontextmanager
async def raw(server: Server, **options: Any) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, **options)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


async def closed(socket: ClientConnection) -> tuple[list[Any], Close]:
    """All messages until the close frame, and that."""
    messages = [json.loads(message) async for message in _messages(socket)]
    assert socket.close_code is not None
    return messages, Close(socket.close_code, socket.close_reason or "")


async def _messages(socket: ClientConnection) -> AsyncIterator[str | bytes]:
    while True:
        try:
            yield await socket.recv()
        except ConnectionClosed:
            return


# -- POST /stream ---------------------------------------------------------------------------------


async def test_results_come_while_the_input_still_comes() -> None:
    async with serving() as server, raw(server) as client:
        await client.start("Transfer-Encoding: chunked\r\nX-Request-Id: abc")
        await client.send(chunk())
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "application/x-ndjson")
        assert headers["x-request-id"] == "abc"
        assert await client.lines() == [{"chunk": 0}]
        for i in range(1, 20):
            await client.send(chunk())
            assert await client.lines() == [{"chunk": i}]
        await client.send(b"abc")
        await client.end()
        assert await client.lines() == [{"rest": 3}]
        assert await client.piece() == b""
        await server.counted((200, "/stream"))


async def test_outputs_that_are_ready_together_go_out_as_lines_of_one_piece() -> None:
    async with serving() as server, raw(server) as client:
        await client.start()
        await client.send(chunk() * 20)
        await client.head()
        assert await client.lines() == [{"chunk": i} for i in range(20)]


async def test_framing_is_ignored_and_content_length_is_as_good_as_chunks() -> None:
    data = chunk() * 3 + b"xy"
    async with serving() as server, httpx.AsyncClient(base_url=server.url) as client:
        whole = await client.post("/stream", content=data)

        async def bytewise() -> AsyncIterator[bytes]:
            for i in range(len(data)):
                yield data[i : i + 1]

        pieces = await client.post("/stream", content=bytewise())
        lines = [json.loads(line) for line in whole.text.splitlines()]
        assert lines == [{"chunk": 0}, {"chunk": 1}, {"chunk": 2}, {"rest": 2}]
        assert pieces.text == whole.text


async def test_an_empty_body_is_an_empty_answer() -> None:
    async with serving() as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post("/stream", content=b"")
        assert (answer.status_code, answer.text) == (200, "")
        assert answer.headers["content-type"] == "application/x-ndjson"


async def test_a_client_that_waits_for_the_head_before_it_sends_gets_it() -> None:
    async with serving() as server, raw(server) as client:
        await client.start()
        assert (await client.head())[0] == 200
        await client.send(chunk())
        assert await client.lines() == [{"chunk": 0}]


@pytest.mark.parametrize(
    ("word", "status", "kind"),
    [
        ("invalid", 422, "invalid_item"),
        ("model", 500, "model_error"),
        ("drain", 503, "shutting_down"),
        ("late", 504, "deadline_exceeded"),
        ("bug", 500, "internal_error"),
        ("value", 500, "model_contract_error"),
    ],
)
async def test_an_error_before_the_first_output_has_its_status(word: str, status: int, kind: str) -> None:
    async with serving() as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post("/stream", content=chunk("!" + word))
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["type"] == kind
        assert error["request_id"] == answer.headers["x-request-id"]
        assert "secret" not in answer.text
        assert ("retry-after" in answer.headers) == (status == 503)
        await server.counted((status, "/stream"))


async def test_a_later_error_is_the_last_line_behind_all_outputs() -> None:
    async with serving() as server, raw(server) as client:
        await client.start()
        await client.send(chunk())
        assert (await client.head())[0] == 200
        assert await client.lines() == [{"chunk": 0}]
        await client.send(chunk() + chunk("!invalid") + chunk())
        assert await client.lines() == [{"chunk": 1}]
        (last,) = await client.lines()
        assert last["error"]["type"] == "invalid_item"
        await client.end()
        assert await client.piece() == b""
        await server.counted((422, "/stream"))


async def test_an_error_reaches_a_client_that_goes_on_sending_and_the_connection_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams_module, "LINGER_S", 0.2)
    async with serving() as server, raw(server) as client:
        await client.start()
        await client.send(chunk("!invalid"))

        async def send_for_ever() -> None:
            while True:
                await client.send(b"x" * 100_000)
                await asyncio.sleep(0.001)

        sender = asyncio.create_task(send_for_ever())
        status, headers = await client.head()
        assert (status, headers["connection"]) == (422, "close")
        body = await client.reader.readexactly(int(headers["content-length"]))
        assert json.loads(body)["error"]["type"] == "invalid_item"
        await asyncio.wait((sender,))
        assert isinstance(sender.exception(), OSError)


async def test_no_room_for_a_stream_is_503_with_retry_after() -> None:
    async with (
        serving(limits=replace(LIMITS, max_streams=0)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        answer = await client.post("/stream", content=b"")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        await server.counted((503, "/stream"))


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"content-encoding": "gzip"}, "without Content-Encoding"),
        ({"content-type": "multipart/form-data; boundary=x"}, "not a form"),
    ],
)
async def test_compressed_bodies_and_forms_are_415(headers: dict[str, str], says: str) -> None:
    async with serving() as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post("/stream", content=b"x", headers=headers)
        assert answer.status_code == 415
        assert says in answer.json()["error"]["message"]


async def test_other_methods_are_405_and_plain_http_on_ws_says_what_to_do() -> None:
    async with serving() as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.get("/stream")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert "WebSocket" in (await client.get("/ws")).json()["error"]["message"]


@pytest.mark.parametrize(
    ("streams", "media"),
    [(Streams.CHUNKS, "application/octet-stream"), (Streams.REQUEST, "application/json")],
)
async def test_the_stream_is_described(streams: Streams, media: str) -> None:
    async with serving(streams) as server, httpx.AsyncClient(base_url=server.url) as client:
        described = (await client.get("/openapi.json")).json()["paths"]
        index = (await client.get("/")).json()["routes"]
        operation = described["/stream"]["post"]
        assert list(operation["requestBody"]["content"]) == [media]
        assert list(operation["responses"]["200"]["content"]) == ["application/x-ndjson"]
        assert (index["/stream"], index["/ws"]) == (["POST"], ["GET"])


async def test_applications_without_streams_have_neither_route() -> None:
    async with serving(Streams.NONE) as server, httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.post("/stream", content=b"")).status_code == 404
        with pytest.raises(InvalidStatus):  # closed with 1008 before it is accepted
            await server.ws()


async def test_a_client_that_vanishes_closes_its_stream() -> None:
    async with serving() as server:
        async with raw(server) as client:
            await client.start()
            await client.send(chunk())
            await client.head()
            (stream,) = server.service.streams
        await server.counted((499, "/stream"))
        assert stream.is_closed


async def test_a_client_that_vanishes_behind_its_input_closes_its_stream() -> None:
    async with serving(Streams.REQUEST) as server:
        async with raw(server) as client:
            body = '{"count": 1, "endless": true}'
            await client.start(f"Content-Length: {len(body)}\r\n\r\n{body}")
            await client.head()
        await server.counted((499, "/stream"))


async def test_a_client_that_half_closes_counts_as_gone() -> None:
    async with serving() as server, raw(server) as client:
        await client.start()
        await client.send(chunk())
        await client.head()
        client.writer.write_eof()
        await server.counted((499, "/stream"))


async def test_a_stalled_input_is_told_and_ended() -> None:
    async with serving(limits=replace(LIMITS, idle_timeout_s=0.2)) as server, raw(server) as client:
        await client.start()
        await client.send(chunk())
        await client.head()
        await client.lines()
        (last,) = await client.lines()
        assert last["error"]["type"] == "stream_timeout"
        assert "idle_timeout_s" in last["error"]["message"]
        await client.end()
        assert await client.piece() == b""
        await server.counted((408, "/stream"))


async def test_input_that_goes_on_is_not_idle_and_ends_at_max_stream_s() -> None:
    limits = replace(LIMITS, idle_timeout_s=0.2, max_stream_s=0.6)
    async with serving(limits=limits) as server, raw(server) as client:
        await client.start()
        told: list[Any] = []
        while not told or "error" not in told[-1]:
            await client.send(chunk())
            if not told:
                await client.head()
            told += await client.lines()
            await asyncio.sleep(0.02)
        assert "max_stream_s" in told[-1]["error"]["message"]
        assert len(told) > 5
        await server.counted((408, "/stream"))


async def test_waiting_for_the_engine_is_no_idleness_of_the_client() -> None:
    async with serving(limits=replace(LIMITS, idle_timeout_s=0.1)) as server, raw(server) as client:
        server.service.runs.clear()
        await client.start()
        await client.send(chunk())
        await client.head()
        await asyncio.sleep(0.3)  # longer than the time-out
        server.service.runs.set()
        assert await client.lines() == [{"chunk": 0}]


async def test_a_fast_client_waits_for_the_engine() -> None:
    async with serving() as server, raw(server) as client:
        server.service.runs.clear()
        await client.start()

        async def send_much() -> None:
            for _ in range(400):
                await client.send(bytes(100_000))

        sender = asyncio.create_task(send_much())
        await asyncio.sleep(0.3)
        assert not sender.done()  # 40 MB, of which sockets hold a few
        (stream,) = server.service.streams
        assert stream.fed_bytes <= 64 * 1024 + 256 * 1024
        sender.cancel()
        server.service.runs.set()


async def test_a_slow_reader_slows_itself_alone_and_is_dropped_after_the_time_out() -> None:
    limits = replace(LIMITS, idle_timeout_s=0.5)
    async with serving(limits=limits) as server, raw(server, limit=1024) as slow, raw(server) as other:
        await slow.start()

        async def send_for_ever() -> None:
            while True:
                await slow.send(chunk() * 1000)

        sender = asyncio.create_task(send_for_ever())
        await until(lambda: bool(server.service.streams))
        (stream,) = server.service.streams
        await other.start()
        await other.send(chunk())
        await other.head()
        assert await other.lines() == [{"chunk": 0}]
        while not stream.is_closed:
            await other.send(chunk())
            assert len(await other.lines()) == 1
            await asyncio.sleep(0.01)
        await until(lambda: server.service.counted == [(499, "/stream")])
        await other.end()
        sender.cancel()


async def test_a_cancel_from_outside_leaves_nothing() -> None:
    """Ray cancels the call when it sees the client leave, or at shutdown."""
    service = FakeStreamingService()
    before = asyncio.all_tasks()

    async def receive() -> Any:
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        pass

    for kind, path in (("http", "/stream"), ("websocket", "/ws")):
        first = [{"type": "websocket.connect"}]

        async def receive_first(first: list[Any] = first, kind: str = kind) -> Any:
            return first.pop() if first and kind == "websocket" else await receive()

        scope = {"type": kind, "method": "POST", "path": path, "headers": [], "root_path": ""}
        call = asyncio.create_task(make_app(service)(scope, receive_first, send))
        await until(lambda: len(service.open) == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not service.open
        assert service.counted.pop() == (499, path)
    assert asyncio.all_tasks() == before


# -- streams of one request -----------------------------------------------------------------------


async def test_a_request_streams_its_outputs() -> None:
    async with serving(Streams.REQUEST) as server, httpx.AsyncClient(base_url=server.url) as client:
        headers = {"x-request-timeout-ms": "500"}
        answer = await client.post("/stream", json={"count": 3}, headers=headers)
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert lines == [{"step": 0}, {"step": 1}, {"step": 2}]
        assert server.service.options[0].timeout_ms == 500
        assert "connection" not in answer.headers


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b'{"count": "x"}', "application/json", 422),
        (b"[" * 10_000, "application/json", 400),
        (b'"' + b"x" * (1 << 20) + b'"', "application/json", 413),
        (b"{}", "text/plain", 415),
    ],
)
async def test_a_bad_request_has_its_status(content: bytes, content_type: str, status: int) -> None:
    async with serving(Streams.REQUEST) as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post("/stream", content=content, headers={"content-type": content_type})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        await server.counted((status, "/stream"))


async def test_an_error_behind_the_outputs_of_a_request_is_its_last_line() -> None:
    async with serving(Streams.REQUEST) as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post("/stream", json={"count": 2, "error": "model"})
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert lines[:2] == [{"step": 0}, {"step": 1}]
        assert lines[2]["error"]["type"] == "model_error"


async def test_a_request_over_a_websocket_streams_its_outputs_and_closes() -> None:
    async with serving(Streams.REQUEST) as server, server.ws() as socket:
        await socket.send('{"count": 2}')
        messages, close = await closed(socket)
        assert messages == [{"step": 0}, {"step": 1}]
        assert close.code == 1000
        await server.counted((200, "/ws"))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b'{"count": 2}', "as a text message"),
        ("{", "ends too early"),
        ("[]", "must have a count"),
        (json.dumps("x" * (1 << 20)), "max_body_bytes"),
    ],
)
async def test_a_bad_request_over_a_websocket_is_told_and_closed_1008(message: Any, says: str) -> None:
    async with serving(Streams.REQUEST) as server, server.ws() as socket:
        await socket.send(message)
        (told,), close = await closed(socket)
        assert says in told["error"]["message"]
        assert close.code == 1008


async def test_more_than_the_request_over_a_websocket_is_refused() -> None:
    async with serving(Streams.REQUEST) as server, server.ws() as socket:
        await socket.send('{"count": 1, "endless": true}')
        assert json.loads(await socket.recv()) == {"step": 0}
        await socket.send('{"end": true}')  # harmless
        await socket.send('{"count": 1}')
        (told,), close = await closed(socket)
        assert (told["error"]["type"], close.code) == ("malformed_request", 1008)


async def test_sockets_that_have_not_asked_yet_are_bounded_as_streams_are() -> None:
    limits = replace(LIMITS, max_streams=2)
    async with serving(Streams.REQUEST, limits) as server, server.ws() as first, server.ws():
        await asyncio.sleep(0.05)
        async with server.ws() as third:
            (told,), close = await closed(third)
            assert (told["error"]["type"], close.code) == ("overloaded", 1013)
        await first.send('{"count": 1}')
        assert json.loads(await first.recv()) == {"step": 0}


async def test_a_websocket_without_a_request_is_idle() -> None:
    limits = replace(LIMITS, idle_timeout_s=0.1)
    async with serving(Streams.REQUEST, limits) as server, server.ws() as socket:
        (told,), close = await closed(socket)
        assert (told["error"]["type"], close.code) == ("stream_timeout", 1013)


# -- /ws ------------------------------------------------------------------------------------------


async def test_a_websocket_gets_each_result_as_a_message_while_it_sends() -> None:
    async with serving() as server, server.ws(additional_headers={"x-request-id": "abc"}) as socket:
        assert socket.response is not None
        assert socket.response.headers["x-request-id"] == "abc"
        for i in range(20):
            await socket.send(chunk())
            assert json.loads(await socket.recv()) == {"chunk": i}
        await socket.send(b"")  # harmless
        await socket.send(b"abc")
        await socket.send(' {"end" : true} ')
        messages, close = await closed(socket)
        assert messages == [{"rest": 3}]
        assert close.code == 1000
        await server.counted((200, "/ws"))


@pytest.mark.parametrize(
    ("word", "kind", "code", "status"),
    [
        ("invalid", "invalid_item", 1008, 422),
        ("model", "model_error", 1011, 500),
        ("bug", "internal_error", 1011, 500),
        ("value", "model_contract_error", 1011, 500),
        ("drain", "shutting_down", 1013, 503),
        ("late", "deadline_exceeded", 1013, 504),
    ],
)
async def test_an_error_is_the_last_message_with_its_close_code(
    word: str, kind: str, code: int, status: int
) -> None:
    async with serving() as server, server.ws() as socket:
        await socket.send(chunk())
        await socket.send(chunk("!" + word))
        messages, close = await closed(socket)
        assert messages[0] == {"chunk": 0}
        assert messages[1]["error"]["type"] == close.reason == kind
        assert close.code == code
        await server.counted((status, "/ws"))


async def test_no_room_for_a_websocket_is_told_behind_the_handshake() -> None:
    async with serving(limits=replace(LIMITS, max_streams=0)) as server, server.ws() as socket:
        (told,), close = await closed(socket)
        assert (told["error"]["type"], close.code) == ("overloaded", 1013)
        await server.counted((503, "/ws"))


@pytest.mark.parametrize(
    "text", ["hello", "{}", '{"end": false}', '{"end": true, "x": 1}', "[", "[" * 10_000]
)
async def test_any_other_text_is_refused_with_1008(text: str) -> None:
    async with serving() as server, server.ws() as socket:
        await socket.send(text)
        (told,), close = await closed(socket)
        assert '{"end": true}' in told["error"]["message"]
        assert close.code == 1008
        await server.counted((400, "/ws"))


async def test_data_behind_the_end_is_refused_and_a_second_end_is_not() -> None:
    async with serving() as server, server.ws() as socket:
        server.service.runs.clear()
        await socket.send(chunk())
        await socket.send('{"end": true}')
        await socket.send('{"end": true}')
        server.service.runs.set()
        messages, close = await closed(socket)
        assert (messages, close.code) == ([{"chunk": 0}], 1000)
    async with serving(Streams.REQUEST) as server, server.ws() as socket:
        await socket.send('{"count": 0, "endless": true}')
        await socket.send(b"data")
        (told,), close = await closed(socket)
        assert ("behind the end" in told["error"]["message"], close.code) == (True, 1008)


async def test_a_websocket_that_sends_nothing_is_idle() -> None:
    async with serving(limits=replace(LIMITS, idle_timeout_s=0.1)) as server, server.ws() as socket:
        (told,), close = await closed(socket)
        assert (told["error"]["type"], close.code) == ("stream_timeout", 1013)
        await server.counted((408, "/ws"))


async def test_a_message_over_max_body_bytes_is_refused_with_1008() -> None:
    async with serving() as server, server.ws() as socket:
        await socket.send(bytes((1 << 20) + 1))
        (told,), close = await closed(socket)
        assert (told["error"]["type"], close.code) == ("request_too_large", 1008)
        await server.counted((413, "/ws"))


async def test_100_mb_in_one_message_is_cut_by_the_server_beneath() -> None:
    async with serving() as server, server.ws() as socket:
        await asyncio.gather(socket.send(bytes(100_000_000)), return_exceptions=True)
        assert (await closed(socket))[1].code in (1009, 1006)  # 1006: the reset overtook the close frame
        await server.counted((413, "/ws"))


async def test_a_long_message_is_fed_in_pieces_and_counted_in_hand() -> None:
    async with serving() as server, server.ws() as socket:
        server.service.runs.clear()
        await socket.send(bytes(CHUNK * 10_000))
        await until(lambda: IN_HAND.bytes == CHUNK * 10_000)
        assert server.service.streams[0].fed_bytes <= 64 * 1024
        server.service.runs.set()
        for i in range(10_000):
            assert json.loads(await socket.recv()) == {"chunk": i}
        assert IN_HAND.bytes == 0


async def test_a_long_message_without_room_for_it_ends_the_stream_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body, "MAX_IN_HAND_BYTES", 100_000)
    async with serving() as server, server.ws() as socket:
        await socket.send(chunk())
        assert json.loads(await socket.recv()) == {"chunk": 0}
        await socket.send(bytes(200_000))
        (told,), close = await closed(socket)
        assert (told["error"]["type"], close.code) == ("overloaded", 1013)
        await server.counted((503, "/ws"))


async def test_a_websocket_that_vanishes_closes_its_stream() -> None:
    async with serving() as server:
        socket = await server.ws()
        await socket.send(chunk())
        await socket.recv()
        (stream,) = server.service.streams
        socket.transport.abort()
        await server.counted((499, "/ws"))
        assert stream.is_closed


async def test_a_websocket_that_closes_politely_early_is_gone_too() -> None:
    async with serving() as server:
        async with server.ws() as socket:
            await socket.send(chunk())
        await server.counted((499, "/ws"))


async def test_a_websocket_that_reads_nothing_has_bounded_memory_and_is_dropped() -> None:
    limits = replace(LIMITS, idle_timeout_s=0.5)
    async with serving(limits=limits) as server:
        slow = await server.ws(max_queue=1)
        slow.transport.pause_reading()

        async def send_for_ever() -> None:
            while True:
                await slow.send(chunk() * 1000)

        sender = asyncio.create_task(send_for_ever())
        await until(lambda: bool(server.service.streams))
        (stream,) = server.service.streams
        async with server.ws() as other:
            while not stream.is_closed:
                await other.send(chunk())
                await other.recv()
        assert server.service.counted[0] == (499, "/ws")
        sender.cancel()
        slow.transport.abort()


async def test_200_websockets_stream_at_once() -> None:
    async with serving() as server:

        async def one() -> None:
            async with server.ws(open_timeout=60) as socket:
                for i in range(5):
                    await socket.send(chunk() * 10)
                    for j in range(10):
                        assert json.loads(await socket.recv()) == {"chunk": 10 * i + j}
                await socket.send('{"end": true}')
                assert (await closed(socket))[1].code == 1000

        await asyncio.gather(*(one() for _ in range(200)))
        await server.counted(*[(200, "/ws")] * 200)


async def test_clients_that_vanish_at_random_points_leave_nothing() -> None:
    async with serving() as server:

        async def one(i: int) -> None:
            socket = await server.ws(open_timeout=60)
            for _ in range(i % 5):
                await socket.send(chunk() * (i % 7))
            if i % 3 == 0:
                await socket.send('{"end": true}')
            socket.transport.abort()

        await asyncio.gather(*(one(i) for i in range(100)))
        await until(lambda: len(server.service.counted) == 100 and not server.service.open)
        assert {status for status, _ in server.service.counted} <= {200, 499}


async def test_messages_are_not_logged_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="serve_app")
    async with serving() as server, server.ws() as socket:
        for _ in range(10):
            await socket.send(chunk())
            await socket.recv()
        ours = [record for record in caplog.records if record.name.startswith("serve_app")]
        assert not ours


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidItem("x"), 1008),
        (errors.BodyStalled("x"), 1008),
        (errors.Overloaded("x"), 1013),
        (errors.StreamTimeout("x"), 1013),
        (errors.ModelFailed("x"), 1011),
        (errors.ServingError("x"), 1011),
    ],
)
def test_close_codes_tell_whose_fault_it_is(error: errors.ServingError, code: int) -> None:
    assert close_code_of(error) == code


# -- in front of Ray ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "is_stream"),
    [("/vad/stream", True), ("/vad/ws", True), ("/vad/predict", False), ("/ws/stats", False)],
)
async def test_streams_alone_ask_ray_to_leave_their_input_to_them(path: str, is_stream: bool) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    scope = {"type": "http", "path": path, "headers": [(b"a", b"b")]}
    await OwnWatch(app)(scope, None, None)  # type: ignore[arg-type]
    assert ((b"x-request-disconnect-disabled", b"?1") in seen) == is_stream


def test_websockets_of_a_replica_have_no_compression_and_no_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.Config, "__init__", uvicorn.Config.__init__)
    assert [one.cls for one in middlewares()] == [OwnWatch]
    config = uvicorn.Config("", host="127.0.0.1", lifespan="off", log_config=None)
    assert (config.ws_per_message_deflate, config.ws_ping_interval) == (False, None)
