"""Bodies: bad JSON, compression, sizes, stalls, clients that leave, content types, forms."""

import asyncio
import gc
import gzip
import json
import logging
import random
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import Message

from deployments.core.contract import Limits
from serve_app.http import body as body_module
from serve_app.http.app import make_app
from serve_app.http.jsonio import Shape, decode
from serve_app.http.native import PredictRequest
from tests.http_fakes import PICTURE_CARD, PREFIX, FakeService, client_of

JSON = {"content-type": "application/json"}
GOOD = b'{"inputs":["a"]}'


@pytest.fixture
def service() -> FakeService:
    return FakeService(limits=Limits(max_items_per_request=3, max_body_bytes=10_000))


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b"inputs=a", "not JSON"),
        (b'{"inputs":["a"]', "ends too early"),
        (b'{"inputs":["a"]}}', "trailing"),
        (b'{"inputs":[NaN]}', "NaN and Infinity are no JSON"),
        (b'{"inputs":[-Infinity]}', "NaN and Infinity are no JSON"),
        (b'{"inputs":[1e999]}', "out of range"),
        (b'{"inputs":["\\ud800"]}', "lone UTF-16 surrogate"),
        (b'{"inputs":["\\udc00x"]}', "lone UTF-16 surrogate"),
        (b'{"inputs":["\xed\xa0\x80"]}', "not valid UTF-8"),
        (b'{"inputs":["\xff"]}', "not valid UTF-8"),
        (b'\xef\xbb\xbf{"inputs":["a"]}', "not JSON"),
        (b'{"inputs":["a"],"inputs":["b"]}', "'inputs' is there twice"),
        (b'{"inputs":["a"],"parameters":{},"parameters":{}}', "'parameters' is there twice"),
    ],
)
async def test_bad_json_is_400_and_says_why(
    client: httpx.AsyncClient, service: FakeService, content: bytes, says: str
) -> None:
    answer = await client.post("/predict", content=content, headers=JSON)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert not service.calls


async def test_json_nested_ten_thousand_deep_is_400() -> None:
    async with client_of(FakeService()) as client:
        content = b'{"inputs":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
        answer = await client.post("/predict", content=content, headers=JSON)
    assert answer.status_code == 400
    assert "nested too deeply" in answer.json()["error"]["message"]


async def test_a_key_named_twice_inside_a_text_is_no_duplicate(client: httpx.AsyncClient) -> None:
    content = json.dumps({"inputs": ['"inputs" and "inputs"']}).encode()
    nested = b'{"inputs":["a",{"x":"\\"inputs\\"","inputs":1}]}'
    assert (await client.post("/predict", content=content, headers=JSON)).status_code == 200
    assert (await client.post("/predict", content=nested, headers=JSON)).status_code == 422


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(GOOD)),
        ("x-gzip", gzip.compress(GOOD)),
        ("GZIP", gzip.compress(GOOD[:7]) + gzip.compress(GOOD[7:])),
        ("deflate", zlib.compress(GOOD)),
        ("deflate", bare_deflate(GOOD)),
        ("identity", GOOD),
    ],
)
async def test_compressed_bodies_are_read(
    client: httpx.AsyncClient, service: FakeService, encoding: str, packed: bytes
) -> None:
    headers = JSON | {"content-encoding": encoding}
    answer = await client.post("/predict", content=packed, headers=headers)
    assert answer.status_code == 200
    assert service.calls[0][0] == ["a"]


@pytest.mark.parametrize(
    ("encoding", "packed", "status"),
    [
        ("gzip", GOOD, 400),
        ("gzip", gzip.compress(GOOD)[:-9], 400),
        ("gzip", gzip.compress(GOOD) + b"rubbish", 400),
        ("gzip", gzip.compress(b"") * 17, 400),
        ("deflate", zlib.compress(GOOD) + b"more", 400),
        ("deflate", b"\x78", 400),
        ("br", GOOD, 415),
        ("gzip, gzip", GOOD, 415),
        ("gzip", gzip.compress(b" " * 10_000_000), 413),
        ("deflate", zlib.compress(b" " * 10_001), 413),
    ],
)
async def test_broken_or_exploding_compression_is_refused(
    client: httpx.AsyncClient, encoding: str, packed: bytes, status: int
) -> None:
    headers = JSON | {"content-encoding": encoding}
    answer = await client.post("/predict", content=packed, headers=headers)
    assert answer.status_code == status


async def test_big_compressed_bodies_are_inflated_off_the_event_loop() -> None:
    service = FakeService()
    text = random.Random(0).randbytes(20_000).hex()
    packed = gzip.compress(json.dumps({"inputs": [text]}).encode())
    assert len(packed) > body_module.THREAD_FROM_BYTES
    async with client_of(service) as client:
        headers = JSON | {"content-encoding": "gzip"}
        answer = await client.post("/predict", content=packed, headers=headers)
    assert answer.status_code == 200
    assert service.calls[0][0] == [text]


async def test_a_body_at_the_limit_passes_and_one_byte_more_does_not(
    client: httpx.AsyncClient,
) -> None:
    for size, status in ((10_000, 200), (10_001, 413)):
        content = GOOD + b" " * (size - len(GOOD))
        answer = await client.post("/predict", content=content, headers=JSON)
        assert answer.status_code == status
    assert "max_body_bytes" in answer.json()["error"]["message"]


class Exchange:
    """Drives the application by hand: messages in, messages out, and how much was received."""

    def __init__(self, service: FakeService, messages: Sequence[Message], **headers: str) -> None:
        self.app = make_app(service)
        self.messages = list(messages)
        self.sent: list[Message] = []
        self.headers = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }

    async def receive(self) -> Message:
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self, path: str = "/predict") -> None:
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": PREFIX + path,
            "root_path": PREFIX,
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in self.headers.items()],
        }
        await self.app(scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


def chunk(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


async def test_a_body_in_chunks_is_put_together(service: FakeService) -> None:
    exchange = Exchange(service, [chunk(GOOD[:5]), chunk(b""), chunk(GOOD[5:], more=False)])
    await exchange.run()
    assert exchange.status == 200


async def test_a_length_over_the_limit_is_refused_before_a_byte_is_read(
    service: FakeService,
) -> None:
    exchange = Exchange(service, [], content_length="10001")
    await exchange.run()
    assert exchange.status == 413


async def test_chunks_over_the_limit_are_refused_as_soon_as_they_are(service: FakeService) -> None:
    exchange = Exchange(service, [chunk(b"x" * 4_000) for _ in range(9)])
    await exchange.run()
    assert exchange.status == 413
    assert len(exchange.messages) == 6


@pytest.mark.parametrize("first", [[], [chunk(b"{")]])
async def test_a_stalled_body_is_408(
    service: FakeService, first: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "STALL_TIMEOUT_S", 0.01)
    exchange = Exchange(service, first)
    await exchange.run()
    assert exchange.status == 408
    assert service.counted == [(408, "/predict")]


@pytest.mark.parametrize("first", [[], [chunk(b"{")]])
async def test_a_client_that_leaves_half_way_counts_as_499(
    service: FakeService, first: list[Message]
) -> None:
    exchange = Exchange(service, [*first, {"type": "http.disconnect"}])
    await exchange.run()
    assert not exchange.sent
    assert service.counted == [(499, "/predict")]


async def test_a_client_that_leaves_while_it_waits_cancels_the_work(service: FakeService) -> None:
    exchange = Exchange(service, [chunk(b'{"inputs":["hang"]}', more=False)])
    task = asyncio.create_task(exchange.run())
    await service.hung.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert service.counted == [(499, "/predict")]


async def test_a_cancel_during_the_body_is_no_stall(service: FakeService) -> None:
    exchange = Exchange(service, [chunk(b"{")])
    task = asyncio.create_task(exchange.run())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert service.counted == [(499, "/predict")]


@pytest.mark.parametrize(
    ("media", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ('Application/JSON; charset="UTF-8"', 200),
        ("application/json; charset=latin-1", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("image/jpeg", 415),
        ("multipart/form-data; boundary=x", 415),
        ("rubbish", 415),
    ],
)
async def test_content_types_of_a_text_model(client: httpx.AsyncClient, media: str, status: int) -> None:
    answer = await client.post("/predict", content=GOOD, headers={"content-type": media})
    assert answer.status_code == status
    if "urlencoded" in media:
        assert "add -H 'content-type: application/json'" in answer.json()["error"]["message"]
    elif status == 415:
        message = answer.json()["error"]["message"]
        assert "accepted: application/json" in message or "charset=utf-8" in message


async def test_json_without_a_content_type_is_read(client: httpx.AsyncClient) -> None:
    assert (await client.post("/predict", content=GOOD)).status_code == 200


@pytest.fixture
def pictures() -> FakeService:
    return FakeService(PICTURE_CARD, Limits(max_items_per_request=2, max_body_bytes=10_000))


def form(*parts: str, end: str = "--b--\r\n") -> bytes:
    return "".join(f"--b\r\n{part}\r\n" for part in parts).encode() + end.encode()


FILE = 'content-disposition: form-data; name="f"; filename="a"\r\n'
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (form(FILE + "\r\none"), 200, ""),
        (form(FILE + "content-type: image/png\r\n\r\none"), 200, ""),
        (form(FILE + "\r\n1", FILE + "\r\n2", FILE + "\r\n3"), 413, "max_items_per_request"),
        (form(FILE + "content-type: image/gif\r\n\r\none"), 415, "image/jpeg, image/png"),
        (form('content-disposition: form-data; name="x"\r\n\r\none'), 400, "'x' is no file"),
        (form(FILE + "\r\none", end=""), 400, "last boundary"),
        (form("x" * 9_000 + ": y\r\n\r\none"), 400, "header size"),
        (b"no form", 400, "multipart"),
        (b"", 400, ""),
        (form(), 400, ""),
        (
            form(
                FILE + "\r\none",
                'content-disposition: form-data; name="parameters"\r\n\r\n{"prio":1}',
            ),
            400,
            "unknown field 'prio'; allowed: timeout_ms, priority",
        ),
    ],
)
async def test_forms(pictures: FakeService, content: bytes, status: int, says: str) -> None:
    async with client_of(pictures) as client:
        answer = await client.post("/predict", content=content, headers=FORM)
    assert answer.status_code == status
    assert says in answer.text


async def test_a_form_may_carry_parameters(pictures: FakeService) -> None:
    async with client_of(pictures) as client:
        answer = await client.post(
            "/predict",
            files=[("f", ("a", b"1")), ("f", ("b", b"2"))],
            data={"parameters": '{"priority":2}'},
        )
    assert answer.status_code == 200
    items, options = pictures.calls[0]
    assert (items, options.priority) == ([b"1", b"2"], 2)


async def test_a_form_without_a_boundary_is_400(pictures: FakeService) -> None:
    async with client_of(pictures) as client:
        headers = {"content-type": "multipart/form-data"}
        answer = await client.post("/predict", content=b"x", headers=headers)
    assert answer.status_code == 400
    assert "boundary" in answer.text


async def test_an_unlisted_image_type_names_the_listed_ones(pictures: FakeService) -> None:
    async with client_of(pictures) as client:
        headers = {"content-type": "image/svg+xml"}
        answer = await client.post("/predict", content=b"<svg/>", headers=headers)
    assert answer.status_code == 415
    assert "application/json, image/jpeg, image/png, multipart/form-data" in answer.text


async def test_an_empty_image_is_400(pictures: FakeService) -> None:
    async with client_of(pictures) as client:
        answer = await client.post("/predict", headers={"content-type": "image/png"})
    assert answer.status_code == 400


def big(inner: bytes, size: int = 1 << 20) -> bytes:
    return b'{"inputs":[' + inner + b"," + b" " * size + inner + b"]}"


async def test_a_big_body_is_not_read_where_the_queue_has_no_room() -> None:
    service = FakeService()
    service.has_room = False
    for headers in ({"content_length": "300000"}, {}, {"content_encoding": "gzip", "content_length": "9"}):
        exchange = Exchange(service, [chunk(GOOD, more=False)], **headers)
        await exchange.run()
        assert exchange.status == 503
        assert len(exchange.messages) == 1
    small = Exchange(service, [chunk(GOOD, more=False)], content_length=str(len(GOOD)))
    await small.run()
    assert (small.status, service.asked) == (200, [1, 1, 1])


async def test_bodies_in_hand_are_bounded_and_given_back(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "MAX_IN_HAND_BYTES", 10_000)
    hanging = GOOD.replace(b'"a"', b'"hang"') + b" " * 8_000
    first = asyncio.create_task(Exchange(service, [chunk(hanging, more=False)]).run())
    await service.hung.wait()
    assert body_module.IN_HAND.bytes == len(hanging)
    second = Exchange(service, [chunk(GOOD + b" " * 4_000, more=False)])
    await second.run()
    assert second.status == 503
    assert (b"retry-after", b"1") in second.sent[0]["headers"]
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert body_module.IN_HAND.bytes == 0
    third = Exchange(service, [chunk(GOOD + b" " * 4_000, more=False)])
    await third.run()
    assert third.status == 200


@pytest.mark.parametrize("length", ["9" * 21, "0" * 5000, "1" * 5000, "x", "-1", ""])
async def test_a_content_length_that_is_no_size_is_400(service: FakeService, length: str) -> None:
    exchange = Exchange(service, [chunk(GOOD, more=False)], content_length=length)
    await exchange.run()
    assert exchange.status == 400


@pytest.mark.parametrize("item", [b"[]", b"{}", b"0", b'{"inputs":1}'])
async def test_16_mb_of_items_are_refused_by_their_count_at_once(item: bytes) -> None:
    service = FakeService(limits=Limits())
    content = b'{"inputs":[' + b",".join([item] * ((16 << 20) // (len(item) + 1) - 10)) + b"]}"
    began = time.process_time()
    exchange = Exchange(service, [chunk(content, more=False)], content_length=str(len(content)))
    await exchange.run()
    assert exchange.status == 413
    assert "max_items_per_request, 256" in exchange.sent[1]["body"].decode()
    # a few ms; building them all took 4 to 11 s
    assert time.process_time() - began < 0.5


async def test_a_big_body_that_names_a_field_twice_is_refused_without_building_it(
    service: FakeService,
) -> None:
    service._limits = Limits()
    twice = b'{"parameters":{},"inputs":["' + b"x" * 300_000 + b'"],"parameters":{}}'
    exchange = Exchange(service, [chunk(twice, more=False)])
    await exchange.run()
    assert exchange.status == 400
    assert b"'parameters' is there twice" in exchange.sent[1]["body"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (big(b'"a"'), 200),
        (big(b'{"a":[1,2.5,null,true]}'), 422),
        (big(b'"a"').replace(b"inputs", b"input"), 400),
        (big(b"NaN"), 400),
        (big(b'"a"')[:-1], 400),
    ],
)
async def test_big_bodies_are_read_as_small_ones_are(content: bytes, status: int) -> None:
    service = FakeService(limits=Limits())
    exchange = Exchange(service, [chunk(content, more=False)])
    await exchange.run()
    assert exchange.status == status
    if status == 200:
        assert service.calls[0][0] == ["a", "a"]
    assert gc.isenabled()


def test_the_garbage_collector_rests_while_a_big_body_is_decoded() -> None:
    """One item of a million lists, as a tensor may be: nothing to count, only to build."""
    collections: list[str] = []
    content = b'{"inputs":[[' + b"[]," * 300_000 + b"[]]]}"
    decoder = msgspec.json.Decoder(PredictRequest)
    gc.callbacks.append(lambda phase, _: collections.append(phase))
    try:
        began = len(collections)
        request = decode(decoder, Shape(PredictRequest), content)
        assert len(collections) - began <= 2
    finally:
        gc.callbacks.pop()
    assert len(request.inputs[0]) == 300_001


async def test_a_client_that_leaves_is_in_the_log(
    service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = Exchange(service, [{"type": "http.disconnect"}], x_request_id="r-7")
    with caplog.at_level(logging.INFO):
        await exchange.run()
    assert "event=client_left route=/predict request_id=r-7" in caplog.text
