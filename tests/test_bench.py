"""The benchmark suite's own pieces: its client, its arithmetic, its page. No Ray, a few seconds."""

import asyncio
import io
import json
import os
import threading
from collections.abc import Iterator

import pytest
from PIL import Image

from scripts.bench import chat, inputs
from scripts.bench.arrivals import after, by_status, latency_ms, poisson
from scripts.bench.audio_streams import Follow, audio, summed_up
from scripts.bench.cases.vadws import largest
from scripts.bench.client import BROKEN, GAVE_UP, Plan, Sample, Shot, parse_response, request, run_here
from scripts.bench.endpoint import ours
from scripts.bench.gaps import longest_gap_s, median_gap_s
from scripts.bench.processes import CpuMeter, Threads, Tree, free_port
from scripts.bench.report import Report, least, most
from scripts.bench.saturate import burst_rate, saturate
from scripts.bench.streams import Ask, listen_here
from scripts.bench.table import TITLES, render
from scripts.bench.turns import against_neighbours
from scripts.bench.websocket import frame, parse_frames

_CHUNKS = (
    b'data: {"choices": [{"text": "a"}]}\n\nda',
    b'ta: {"choices": [{"text": "b"}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n',
)
_EVENTS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*_CHUNKS, b"")
)


@pytest.fixture
def answering_port() -> Iterator[int]:
    """A server that answers 200 with the request's body; `/slow`: after 0.3 s; `/events`: as two events."""
    port, started, ends = free_port(), threading.Event(), []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                if b"/slow" in head:
                    await asyncio.sleep(0.3)
                if b"/events" in head:
                    writer.write(_EVENTS)
                    await writer.drain()
                    continue
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
    assert 5_000_000 < Tree(os.getpid()).anonymous_bytes("") <= Tree(os.getpid()).rss_bytes()


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


def test_whole_batches_leave_together_and_nobody_joins_one(answering_port: int) -> None:
    at_s = (0.0, 0.05, 0.1, 0.15)  # the first alone, the next two together, the last after them
    shots = [Shot(request("/slow", b"x"), at_s=at, tag=str(i)) for i, at in enumerate(at_s)]
    load = run_here(Plan(answering_port, shots, batch_size=2))
    ends_s = {s.tag: s.at_s + s.latency_s for s in load.samples}
    assert [s.status for s in load.samples] == [200] * 4
    assert [round(ends_s[str(i)] / 0.3 - 0.05) for i in range(4)] == [1, 2, 2, 3]
    assert load.samples[-1].latency_s > 0.6  # from its arrival, the wait included


def test_whole_batch_with_a_broken_member_does_not_hold_up_the_next() -> None:
    shots = [Shot(request("/", b""), at_s=0.01 * i) for i in range(3)]
    load = run_here(Plan(free_port(), shots, batch_size=2))
    assert [s.status for s in load.samples] == [BROKEN] * 3


def test_stream_client_reads_events_across_chunks(answering_port: int) -> None:
    heard = listen_here(answering_port, [Ask("/events", b"{}", tag="x")])[0]
    assert (heard.status, heard.text, heard.tokens, heard.error) == (200, "ab", 2, "")
    assert len(heard.times_s) == 2
    assert heard.sent_s <= heard.times_s[0] <= heard.times_s[1] <= heard.end_s


def test_stream_client_that_leaves_has_left_and_says_so(answering_port: int) -> None:
    asks = [Ask("/slow", b"{}", leave_s=0.05), Ask("/slow", b"{}", at_s=0.1)]
    left, stayed = listen_here(answering_port, asks)
    assert (left.has_left, left.status, stayed.has_left, stayed.status) == (True, 0, False, 200)
    with pytest.raises(ValueError, match="no text came"):
        _ = left.first_s


def test_gaps_are_counted_in_the_window_they_end_in() -> None:
    streams = [[0.0, 1.0, 2.0, 5.0, 6.0], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]]
    assert median_gap_s(streams, 0.0, 2.5) == 1.0
    assert longest_gap_s(streams, 2.5, 5.5) == 3.0


def test_gap_that_overlaps_the_window_counts_whole_and_so_does_silence() -> None:
    assert longest_gap_s([[0.0, 1.0, 4.0]], 2.0, 3.0) == 3.0
    assert longest_gap_s([[0.0, 1.0]], 1.0, 5.0) == 4.0  # it never spoke again
    assert longest_gap_s([[0.0, 1.0, 2.0]], 1.5, 2.0) == 1.0


def test_first_is_compared_with_its_neighbours() -> None:
    rates = {"ours": [30.0, 60.0, 60.0], "other": [20.0, 30.0], "third": [40.0, 15.0]}
    assert against_neighbours(rates) == {"other": 2.0, "third": pytest.approx(2.5)}


def test_largest_count_must_pass_twice() -> None:
    answers = {1: [True], 2: [True, False], 3: [False]}
    assert largest((1, 2, 3), lambda count: answers[count].pop(0) if answers[count] else True) == 1
    assert largest((1, 2), lambda count: False) == 0


def test_mix_is_the_same_each_time_and_in_range() -> None:
    jobs = chat.mix(50, seed=7)
    assert jobs == chat.mix(50, seed=7)
    assert all(16 <= len(job.prompt) <= 256 and 16 <= job.max_tokens <= 256 for job in jobs)
    assert chat.tokens(400, 1)[:8] != chat.tokens(400, 2)[:8]
    body = json.loads(jobs[0].body(cache_prompt=False))
    assert (body["stream"], body["ignore_eos"], body["cache_prompt"]) == (True, True, False)
    assert "stream" not in json.loads(jobs[0].body(is_streamed=False))


@pytest.mark.parametrize("length", [0, 125, 126, 10_240])
def test_frames_are_read_whole_or_left(length: int) -> None:
    payload = bytes(length)
    sent = frame(payload)
    head = 2 if length < 126 else 4
    assert sent[head : head + 4] == bytes(4)  # a mask that changes nothing
    unmasked = bytes([sent[0], sent[1] & 0x7F]) + sent[2:head] + payload
    assert parse_frames(unmasked * 2 + unmasked[:1]) == ([(2, payload)] * 2, unmasked[:1])
    assert parse_frames(unmasked[:-1])[0] == []


def test_results_that_never_came_are_late() -> None:
    plan = Follow(port=0, count=2, duration_s=3.2, warm_up_s=1.6)
    assert (plan.messages, plan.first, plan.due) == (10, 5, 100)
    found = summed_up(plan, [0.1] * 89 + [0.3], [0.0, 0.002], 0.4, ["gone"])
    assert (found.in_time_share, found.came, found.due, found.closed) == (0.89, 90, 100, ["gone"])
    assert len(audio(0.32)) == 2 * 5120


def test_cpu_of_threads_names_this_process() -> None:
    threads = Threads(Tree(os.getpid()))
    sum(i * i for i in range(3_000_000))
    used = threads.cpu_s()
    assert max(used.values()) > 0.0
    assert used[max(used, key=lambda thread: used[thread])] < 60.0
