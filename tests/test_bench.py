"""The benchmark suite's own pieces: its client, its arithmetic, its page. No Ray, a few seconds."""

import asyncio
import io
import json
import os
import threading
from collections.abc import Iterator

import pytest
from PIL import Image

from scripts.bench import inputs
from scripts.bench.arrivals import after, by_status, latency_ms, poisson
from scripts.bench.client import BROKEN, GAVE_UP, Plan, Sample, Shot, parse_response, request, run_here
from scripts.bench.endpoint import ours
from scripts.bench.processes import CpuMeter, Tree, free_port
from scripts.bench.report import Report, least, most
from scripts.bench.saturate import burst_rate, saturate
from scripts.bench.table import TITLES, render


@pytest.fixture
def answering_port() -> Iterator[int]:
    """A server that answers 200 with the request's body; `slow` in the path: after 0.3 s."""
    port, started, ends = free_port(), threading.Event(), []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                if b"/slow" in head:
                    await asyncio.sleep(0.3)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (length, body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(stop.set))
        server = await asyncio.start_server(answer, "127.0.0.1", port)
        started.set()
        async with server:
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(5)
    yield port
    ends[0]()
    thread.join(5)


def test_closed_loop_sends_each_shot_once_and_keeps_the_bodies(answering_port: int) -> None:
    shots = [Shot(request("/echo", b"%d" % i), tag=str(i)) for i in range(50)]
    load = run_here(Plan(answering_port, shots, connections=4, keeps_bodies=True))
    assert sorted((s.tag, s.body, s.status) for s in load.samples) == sorted(
        (str(i), b"%d" % i, 200) for i in range(50)
    )


def test_open_loop_latency_counts_from_the_intended_time(answering_port: int) -> None:
    shots = [Shot(request("/slow", b"x"), at_s=0.02 * i) for i in range(10)]
    load = run_here(Plan(answering_port, shots))
    assert [s.status for s in load.samples] == [200] * 10
    assert all(0.28 < s.latency_s < 1.0 for s in load.samples)
    assert load.wall_s < 1.5  # all of them were under way together


def test_client_that_gives_up_closes_and_is_counted(answering_port: int) -> None:
    shots = [Shot(request("/slow", b"x"), give_up_s=0.05), Shot(request("/quick", b"x"))]
    load = run_here(Plan(answering_port, shots))
    assert by_status(load.samples) == {"200": 1, "gave_up": 1}


def test_nobody_listening_is_broken_not_a_hang() -> None:
    load = run_here(Plan(free_port(), [Shot(request("/", b""))]))
    assert [s.status for s in load.samples] == [BROKEN]


def test_saturate_counts_good_answers(answering_port: int) -> None:
    got = saturate(answering_port, "/echo", [b"a", b"bb"], connections=2, duration_s=1)
    assert got.rate > 50
    assert got.failed == 0


@pytest.mark.parametrize(
    ("data", "parsed"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Le", None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab", None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", (200, b"abc", False)),
        (
            b"HTTP/1.1 503 x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            (503, b"", True),
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            (200, b"abc", False),
        ),
    ],
)
def test_response_is_read_whole_or_not_at_all(data: bytes, parsed: object) -> None:
    assert parse_response(data) == parsed


def test_poisson_arrivals_have_their_rate_and_their_seed() -> None:
    times = poisson(100.0, 20.0, seed=1)
    assert times == sorted(times) == poisson(100.0, 20.0, seed=1)
    assert 1800 < len(times) < 2200


def test_warm_up_is_cut_by_intended_time_and_quantiles_by_status() -> None:
    samples = [Sample("", float(i), 200 if i % 2 else GAVE_UP, i / 1e3) for i in range(10)]
    assert [s.at_s for s in after(samples, 7.0)] == [7.0, 8.0, 9.0]
    assert latency_ms(samples, 0.5) == 5.0
    assert latency_ms(samples, 0.5, status=503) == 0.0


def test_endpoint_reads_the_value_and_survives_errors() -> None:
    endpoint = ours("app")
    assert b"X-Request-Timeout-Ms: 250\r\n" in endpoint.shot(1.0, timeout_ms=250).payload
    assert endpoint.value(Sample("", 0, 200, 0, body=b'{"outputs": [3.0]}')) == 3.0
    assert endpoint.value(Sample("", 0, 503, 0, body=b"no")) is None


def test_texts_are_the_same_each_time_and_of_8_to_128_words() -> None:
    texts = inputs.texts(40)
    assert texts == inputs.texts(40)
    assert all(8 <= len(text.split()) <= 128 for text in texts)


def test_jpegs_are_the_same_each_time_and_of_photographic_size() -> None:
    images = inputs.jpegs(2)
    assert images == inputs.jpegs(2)
    for image in images:
        assert 20_000 < len(image) < 120_000
        assert max(Image.open(io.BytesIO(image)).size) in range(480, 521)


def test_cpu_of_a_tree_includes_this_process() -> None:
    meter = CpuMeter(Tree(os.getpid()))
    meter.start()
    sum(i * i for i in range(3_000_000))
    cpu_s, _, wall_s = meter.stop()
    assert cpu_s > 0.0
    assert wall_s > 0.0
    assert Tree(os.getpid()).rss_bytes() > 10_000_000


def test_report_judges_its_targets_and_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("fill", {"c64": {"mean_fill": 0.97}}, [least("c64.mean_fill", 0.95)], {})
    report.publish(None)
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert value["reached"] == {"c64.mean_fill": True}
    assert {"git_sha", "config", "hardware", "versions", "target", "figures"} <= value.keys()
    assert not most("x", 1).is_reached({"x": 2})


def test_page_names_what_was_not_measured_and_what_fell_short() -> None:
    report = Report("poison", {"innocents_failed": 2}, [most("innocents_failed", 0)], {})
    page = render({"poison": report.to_json()})
    assert "| `innocents_failed` | <= 0 | 2 | **no** |" in page
    assert page.count("not measured") == len(TITLES) - 1


def test_rate_is_taken_from_burst_to_burst() -> None:
    bursts = [0.1 + 0.5 * n + 0.001 * i for n in range(8) for i in range(32)]
    assert burst_rate(bursts, 4.0) == pytest.approx(64.0)
    assert burst_rate(bursts[:32], 4.0) == 8.0  # one burst tells no period
    assert burst_rate([], 4.0) == 0.0
