"""Between the engine and its readers: back-pressure both ways, and every kind of end.

In virtual time, where a step takes STEP_S. A chunk is two bytes; its output is its text.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from deployments.core.errors import (
    DeadlinePassed,
    Draining,
    InternalError,
    InvalidItem,
    ModelFailed,
    Overloaded,
    ServingError,
)
from deployments.engine.engine import Engine
from deployments.engine.scheduler import EngineLimits
from deployments.engine.sequence import Advance, Sequence, State, Step
from deployments.engine.stream import MAX_UNREAD_OUTPUTS, MAX_WAITING_UNITS, EngineLoop, StepSeconds, Stream
from tests.core import virtual_time
from tests.engine.drive import walk

STEP_S = 1.0


class Pairs:
    """Chunks of two bytes. b"!!" is refused; an odd byte at the end is, too."""

    def __init__(self) -> None:
        self.taken = 0

    def split(self, sequence: Sequence, data: bytes) -> int:
        self.taken += len(data)
        if b"!!" in data:
            raise InvalidItem("no !! please")
        chunks, rest = sequence.payload["chunks"], sequence.payload["rest"] + data
        pairs = [rest[i : i + 2] for i in range(0, len(rest) - 1, 2)]
        chunks += pairs
        sequence.payload["rest"] = rest[2 * len(pairs) :]
        return len(pairs)

    def finish_input(self, sequence: Sequence) -> int:
        if sequence.payload["rest"]:
            raise InvalidItem("the stream ended within a chunk")
        return 0


class Model:
    """Answers chunks with their text ("xx": it raises; "##": done), walks with their number of steps left."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.raises: BaseException | None = None

    def run(self, step: Step) -> list[Advance]:
        self.steps.append(step)
        if self.raises is not None and step.work:
            raise self.raises
        return [self._advance(work.sequence) for work in step.work]

    def _advance(self, sequence: Sequence) -> Advance:
        if isinstance(sequence.payload, int):
            sequence.payload -= 1
            is_done = sequence.payload == 0
            return Advance(units=0 if is_done else 1, outputs=(sequence.payload,), is_done=is_done)
        text = sequence.payload["chunks"].pop(0).decode()
        if text == "xx":
            return Advance(error=ModelFailed("it raised"))
        return Advance(outputs=(text,), is_done=text == "##")

    @property
    def ended(self) -> list[Sequence]:
        return [sequence for step in self.steps for sequence in step.ended]


class Watcher:
    def __init__(self) -> None:
        self.seconds: list[StepSeconds] = []
        self.gaps: list[float | None] = []

    def on_step(self, step: Step, seconds: StepSeconds) -> None:
        self.seconds.append(seconds)

    def on_outputs(self, sequence: Sequence, count: int, gap_s: float | None) -> None:
        self.gaps.append(gap_s)


class Bench:
    """An EngineLoop with all around it."""

    def __init__(self, *, slots: int = 8, max_waiting: int = 8, holds: bool = True) -> None:
        limits = EngineLimits(
            step_cost=slots, lane_cost=slots, slots=slots, step_units=slots, burst=1, max_waiting=max_waiting
        )
        self.engine, self.model, self.chunks = Engine(limits), Model(), Pairs()
        self.observer = Watcher()
        self.loop = EngineLoop(
            self.engine,
            self.model,
            call=self._call,  # type: ignore[arg-type]
            clock=asyncio.get_running_loop().time,
            observer=self.observer,
            chunks=self.chunks,
            holds=holds,
        )
        self.loop.start()

    async def _call(self, function: Callable[[], list[Advance]]) -> list[Advance]:
        await asyncio.sleep(STEP_S)
        return function()

    @property
    def now(self) -> float:
        return self.loop.clock()

    def open(self, **fields: Any) -> Stream:
        sequence = Sequence(payload={"chunks": [], "rest": b""}, is_open=True, arrived=self.now, **fields)
        return self.loop.open([sequence])[0]

    def walk(self, steps: int, **fields: Any) -> Stream:
        return self.loop.open([walk(steps, arrived=self.now, **fields)])[0]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(main())


async def read_all(stream: Stream, outputs: list[Any] | None = None) -> list[Any]:
    """All outputs; `outputs` has them also where an error ends the stream."""
    outputs = [] if outputs is None else outputs
    while part := await stream.read():
        outputs += part
    return outputs


# -- the way through ---------------------------------------------------------------------------------


def test_chunks_in_give_outputs_in_order_and_the_end_of_input_is_the_end() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        await stream.feed(b"aabbc")
        await stream.feed(b"cdd")
        stream.end_input()
        assert await read_all(stream) == ["aa", "bb", "cc", "dd"]
        assert await stream.read() == []
        assert not bench.loop.streams

    run(main)


def test_outputs_are_read_while_the_next_step_runs() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.walk(5)
        times = []
        while await stream.read():
            times.append(bench.now)
        assert times == [1.0, 2.0, 3.0, 4.0, 5.0]

    run(main)


def test_who_comes_during_a_step_is_in_the_next() -> None:
    async def main() -> None:
        bench = Bench()
        bench.walk(3)
        await asyncio.sleep(0.5 * STEP_S)
        late = bench.walk(1)
        assert await late.read() == [0]
        assert bench.now == 2.0

    run(main)


def test_an_input_that_ends_before_anything_came_ends_the_stream() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        stream.end_input()
        assert await stream.read() == []
        assert bench.engine.running == bench.engine.waiting == 0

    run(main)


def test_an_input_that_ended_before_its_turn_came_is_still_computed() -> None:
    async def main() -> None:
        bench = Bench(slots=1)
        bench.walk(3)
        stream = bench.open()
        await stream.feed(b"aabb")
        stream.end_input()
        assert await read_all(stream) == ["aa", "bb"]

    run(main)


def test_ending_the_input_twice_is_ending_it_once() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        await stream.feed(b"aab")
        stream.end_input()
        stream.end_input()
        with pytest.raises(InvalidItem, match="within a chunk"):
            assert await read_all(stream) == []
        assert bench.model.ended == [stream.sequence] or not bench.model.ended

    run(main)


def test_the_observer_hears_of_first_outputs_gaps_and_where_steps_spent_their_time() -> None:
    async def main() -> None:
        bench = Bench()
        await read_all(bench.walk(3))
        assert bench.observer.gaps == [None, 1.0, 1.0]
        assert [seconds.run for seconds in bench.observer.seconds[:3]] == [1.0] * 3
        assert all(seconds.schedule == seconds.send == 0.0 for seconds in bench.observer.seconds)

    run(main)


# -- back-pressure -----------------------------------------------------------------------------------


def test_feeding_waits_while_the_engine_is_behind() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        feeding = asyncio.ensure_future(stream.feed(b"aa" * (MAX_WAITING_UNITS + 9)))
        await asyncio.sleep(9.5 * STEP_S)
        assert not feeding.done()
        await asyncio.sleep(STEP_S)
        assert feeding.done()

    run(main)


def test_a_whole_recording_is_fed_piece_by_piece() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        feeding = asyncio.ensure_future(stream.feed_all(b"aa" * 40_000))
        await asyncio.sleep(1.5 * STEP_S)
        assert len(stream.sequence.payload["chunks"]) < 20_000
        stream.close()
        await feeding
        assert bench.chunks.taken < 40_000

    run(main)


def test_a_slow_reader_is_held_and_goes_on_once_it_has_read() -> None:
    async def main() -> None:
        bench = Bench()
        slow, other = bench.walk(2 * MAX_UNREAD_OUTPUTS), bench.walk(2 * MAX_UNREAD_OUTPUTS)
        reading = asyncio.ensure_future(read_all(other))
        await asyncio.sleep(1.5 * MAX_UNREAD_OUTPUTS * STEP_S)
        assert slow.sequence.is_held
        assert slow.sequence.computed == MAX_UNREAD_OUTPUTS
        assert other.sequence.computed > MAX_UNREAD_OUTPUTS
        assert len(await read_all(slow)) == 2 * MAX_UNREAD_OUTPUTS
        assert len(await reading) == 2 * MAX_UNREAD_OUTPUTS

    run(main)


def test_a_held_stream_that_is_alone_wakes_the_engine_when_it_is_read() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.walk(MAX_UNREAD_OUTPUTS + 1)
        await asyncio.sleep(2 * MAX_UNREAD_OUTPUTS * STEP_S)
        assert len(await read_all(stream)) == MAX_UNREAD_OUTPUTS + 1

    run(main)


def test_language_models_are_not_held() -> None:
    async def main() -> None:
        bench = Bench(holds=False)
        stream = bench.walk(2 * MAX_UNREAD_OUTPUTS)
        await asyncio.sleep(2 * MAX_UNREAD_OUTPUTS * STEP_S + 0.5)
        assert stream.sequence.state is State.ENDED
        assert len(await read_all(stream)) == 2 * MAX_UNREAD_OUTPUTS

    run(main)


def test_a_feeder_that_waits_is_let_go_when_the_stream_ends() -> None:
    async def main() -> None:
        bench = Bench()
        closed, failed = bench.open(), bench.open()
        data = b"aa" * 2 * MAX_WAITING_UNITS
        feeding = [asyncio.ensure_future(stream.feed(data)) for stream in (closed, failed)]
        await asyncio.sleep(0.5 * STEP_S)
        closed.close()
        failed.fail(Draining("stopping"))
        results = await asyncio.gather(*feeding, return_exceptions=True)
        assert results[0] is None
        assert isinstance(results[1], Draining)

    run(main)


def test_what_comes_after_the_model_is_done_is_thrown_away() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        await stream.feed(b"##")
        assert await read_all(stream) == ["##"]
        for _ in range(100):
            await stream.feed(b"aa" * 1000)
        assert bench.chunks.taken == 2
        assert stream.sequence.payload["chunks"] == []
        stream.end_input()
        assert await stream.read() == []

    run(main)


# -- errors ------------------------------------------------------------------------------------------


def test_an_error_of_one_sequence_comes_after_its_outputs_and_ends_it_alone() -> None:
    async def main() -> None:
        bench = Bench()
        bad, good = bench.open(), bench.open()
        await bad.feed(b"aaxxbb")
        await good.feed(b"aabb")
        good.end_input()
        outputs: list[Any] = []
        with pytest.raises(ModelFailed, match="it raised"):
            await read_all(bad, outputs)
        assert outputs == ["aa"]
        assert await read_all(good) == ["aa", "bb"]
        with pytest.raises(ModelFailed):
            await bad.feed(b"cc")

    run(main)


def test_an_error_at_the_end_of_the_input_comes_after_what_was_fed() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        await stream.feed(b"aabbc")
        stream.end_input()
        assert await stream.read() == ["aa"]
        assert await stream.read() == ["bb"]
        with pytest.raises(InvalidItem, match="within a chunk"):
            await stream.read()

    run(main)


def test_an_input_that_is_refused_ends_the_stream_and_reader_and_feeder_hear_why() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        await stream.feed(b"aa")
        await asyncio.sleep(1.5 * STEP_S)
        with pytest.raises(InvalidItem):
            await stream.feed(b"!!")
        assert await stream.read() == ["aa"]
        with pytest.raises(InvalidItem, match="no !!"):
            await stream.read()
        await asyncio.sleep(2 * STEP_S)
        assert bench.model.ended == [stream.sequence]

    run(main)


def test_a_recording_that_cannot_be_cut_for_a_bug_of_ours_leaves_nobody_waiting() -> None:
    async def main() -> None:
        bench = Bench()
        bench.chunks.split = lambda sequence, data: 1 // 0  # type: ignore[method-assign]
        stream = bench.open()
        feeding = asyncio.ensure_future(stream.feed_all(b"aa"))
        with pytest.raises(InternalError):
            await stream.read()
        await feeding

    run(main)


def test_a_runner_that_raises_fails_only_the_sequences_of_its_step() -> None:
    async def main() -> None:
        bench = Bench(slots=2)
        first, second, waits = bench.walk(5), bench.walk(5), bench.walk(2)
        await asyncio.sleep(0.5 * STEP_S)
        bench.model.raises = RuntimeError("secret")
        await asyncio.sleep(STEP_S)
        bench.model.raises = None
        for stream in (first, second):
            with pytest.raises(ModelFailed) as caught:
                await read_all(stream)
            assert "secret" not in str(caught.value)
            assert "secret" in str(caught.value.detail)
        assert await read_all(waits) == [1, 0]
        assert bench.engine.counters.failed == 2

    run(main)


def test_an_engine_that_breaks_ends_all_streams_and_takes_no_more() -> None:
    async def main() -> None:
        bench = Bench()
        bench.model.run = lambda step: []  # type: ignore[method-assign]  # advances are missing
        stream, idle = bench.walk(5), bench.open()
        for one in (stream, idle):
            with pytest.raises(InternalError):
                await one.read()
        assert not bench.loop.is_alive
        with pytest.raises(ServingError):
            bench.walk(1)
        await bench.loop.close()

    run(main)


# -- leaving -----------------------------------------------------------------------------------------


def test_closing_frees_the_slot_before_the_next_step() -> None:
    async def main() -> None:
        bench = Bench(slots=1)
        first, second = bench.walk(100), bench.walk(1)
        await asyncio.sleep(1.5 * STEP_S)
        first.close()
        assert bench.engine.running == 0
        assert await second.read() == [0]
        assert bench.now == 3.0
        assert bench.model.steps[-1].ended == [first.sequence]

    run(main)


def test_closing_an_idle_stream_tells_the_runner_at_once() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        await stream.feed(b"aa")
        await asyncio.sleep(5 * STEP_S)
        stream.close()
        await asyncio.sleep(1.5 * STEP_S)
        assert bench.model.ended == [stream.sequence]

    run(main)


def test_closing_twice_or_after_the_end_is_nothing() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.walk(1)
        assert await read_all(stream) == [0]
        stream.close()
        stream.close()
        assert await stream.read() == []
        assert bench.engine.counters.cancelled == 0
        assert bench.engine.counters.finished == 1

    run(main)


def test_a_reader_that_waits_is_let_go_when_another_task_closes() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.open()
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0.5)
        stream.close()
        assert await reading == []

    run(main)


def test_ending_all_leaves_what_was_computed_to_be_read_before_the_error() -> None:
    async def main() -> None:
        bench = Bench(slots=2)
        running, idle, waits = bench.walk(9), bench.open(), bench.walk(9)
        await asyncio.sleep(2.5 * STEP_S)
        bench.loop.end_all(Draining("stopping"))
        assert bench.engine.running == bench.engine.waiting == 0
        assert await running.read() == [8, 7]
        for stream in (running, idle, waits):
            with pytest.raises(Draining):
                await stream.read()

    run(main)


def test_deadlines_wake_an_engine_with_nothing_else_to_do() -> None:
    async def main() -> None:
        bench = Bench(slots=1)
        bench.open()
        await asyncio.sleep(2.0)
        late = bench.open(deadline=7.0)
        with pytest.raises(DeadlinePassed):
            await late.read()
        assert bench.now == 7.0

    run(main)


def test_a_full_queue_refuses_and_opens_nothing() -> None:
    async def main() -> None:
        bench = Bench(slots=1, max_waiting=1)
        bench.walk(5), bench.walk(5)
        with pytest.raises(Overloaded):
            bench.walk(5)
        assert len(bench.loop.streams) == 2

    run(main)


def test_a_loop_that_closes_tells_the_runner_of_all_that_had_begun() -> None:
    """A class's `end` is called at any kind of end, the server's too."""

    async def main() -> None:
        bench = Bench()
        streams = [bench.walk(100) for _ in range(3)]
        await asyncio.sleep(2.5 * STEP_S)
        bench.loop.end_all(Draining("stopping"))
        await bench.loop.close()
        assert bench.model.ended == [stream.sequence for stream in streams]
        assert not bench.loop.is_alive

    run(main)


def test_a_loop_closes_in_bounded_time_though_a_step_hangs() -> None:
    async def main() -> None:
        bench = Bench()
        bench.loop._call = lambda function: asyncio.get_running_loop().create_future()
        bench.walk(1)
        await asyncio.sleep(1.0)
        bench.loop.end_all(Draining("stopping"))
        began = bench.now
        await bench.loop.close()
        assert bench.now - began <= 10.0

    run(main)
