"""A continuous replica without Ray: start, /predict, streams, limits, draining, figures."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deployments.core.contract import Answer, Limits, OutputStream, RequestOptions
from deployments.core.errors import (
    ContextLengthExceeded,
    DeadlinePassed,
    Draining,
    InternalError,
    InvalidItem,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
)
from deployments.core.generation import FinishReason, GenerationRequest, Sampling
from deployments.engine.stream import Stream
from deployments.models.smollm2 import SmolLM2
from deployments.runtime.continuous import ContinuousService
from deployments.runtime.fronts import LanguageFront, Place, StepFront, front_of
from deployments.runtime.step_curve import useful_batch
from deployments.runtime.stepwise import StepModel
from tests.llm_loop import expect, write_checkpoint

LIMITS = Limits(max_sequences=4, max_streams=16, max_queue_items=32)


class Counter:
    """Counts {"to": n} up to n, a number a step; {"to": "bad"} is refused, {"fail": k} raises in step k."""

    ends: int

    def load(self, device: str) -> None:
        self.ends = 0

    def cost(self, request: dict[str, Any]) -> float:
        return float(request.get("cost", 1))

    def begin(self, request: dict[str, Any]) -> dict[str, torch.Tensor]:
        if not isinstance(request.get("to"), int):
            raise ValueError('"to" must be a whole number')
        return {name: torch.tensor(request.get(name, 0)) for name in ("to", "fail")} | {"at": torch.tensor(0)}

    def step(self, states: dict[str, torch.Tensor], inputs: list[None]) -> Any:
        at = states["at"] + 1
        if bool((at == states["fail"]).any()):
            raise RuntimeError("the model's own text")
        return states | {"at": at}, at.tolist(), (at >= states["to"]).tolist()

    def end(self, state: dict[str, torch.Tensor]) -> None:
        self.ends += 1

    def examples(self) -> list[dict[str, int]]:
        return [{"to": 6}]


class Plain(Counter):
    """Without examples: no warm-up."""

    def examples(self) -> list[dict[str, int]]:
        return []


class Shouter:
    """A stream of lines, each answered in capitals; a rest without its line's end is refused."""

    def load(self, device: str) -> None: ...

    def begin(self, request: None) -> dict[str, torch.Tensor]:
        return {"lines": torch.tensor(0)}

    def preprocess(self, item: Any) -> bytes:
        if not isinstance(item, str):
            raise ValueError("expected a string")
        return item.encode()

    def chunk(self, data: bytes) -> tuple[list[str], bytes]:
        *lines, rest = data.split(b"\n")
        return [line.decode() for line in lines], rest

    def step(self, states: dict[str, torch.Tensor], inputs: list[str]) -> Any:
        return states, [text.upper() for text in inputs], [text == "bye" for text in inputs]

    def examples(self) -> list[str]:
        return ["one\ntwo\nthree\nfour\nfive\nsix\n"]


@asynccontextmanager
async def serving(
    model: type = Plain, limits: Limits = LIMITS, **model_args: Any
) -> AsyncIterator[ContinuousService]:
    service = ContinuousService("app", front_of(model, model_args), limits)
    await service.start(Place("cpu"))
    try:
        yield service
    finally:
        await service.close()


async def ask(service: ContinuousService, *items: Any, **options: Any) -> Answer:
    return await service.predict(items, RequestOptions(**options))


def values(answer: Answer) -> list[Any]:
    return [outcome.error or outcome.value for outcome in answer.outcomes]


def model_of(service: ContinuousService) -> Any:
    front = service._front
    assert isinstance(front, StepFront)
    return front._model.model


async def quiet(service: ContinuousService) -> None:
    """Until nothing runs, waits or is left to be told to the runner."""
    engine = service.loop.engine
    await until(lambda: not (engine.running or engine.waiting or engine.scheduler.freed))
    await service._thread.call(lambda: None)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


async def read_all(stream: OutputStream) -> list[Any]:
    outputs: list[Any] = []
    while part := await stream.read():
        outputs += part
    return outputs


# -- /predict ----------------------------------------------------------------------------------------


async def test_a_list_comes_back_in_order_one_value_a_sequence() -> None:
    async with serving() as service:
        answer = await ask(service, {"to": 3}, {"to": 1}, {"to": 2})
        await quiet(service)
    assert values(answer) == [[1, 2, 3], [1], [1, 2]]
    assert answer.batch_size == 3
    assert answer.model_ms > 0.0
    assert [outcome.cost for outcome in answer.outcomes] == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"to": "bad"}, InvalidItem),  # by begin
        ({"to": 3, "cost": 5}, InvalidItem),  # at the door: a step holds 4
        ({"to": 3, "fail": 2}, ModelFailed),  # in a step
        ("no dict", ModelFailed),  # in cost
    ],
)
async def test_one_bad_item_fails_alone(bad: Any, error: type[Exception]) -> None:
    async with serving() as service:
        first, wrong, last = values(await ask(service, {"to": 3}, bad, {"to": 2}))
    assert first == [1, 2, 3]
    assert isinstance(wrong, error)
    assert last == [1, 2]


async def test_all_items_bad_is_an_answer_too() -> None:
    async with serving() as service:
        answer = await ask(service, {"to": 1, "cost": 99}, {"to": 1, "cost": 99})
    assert all(isinstance(value, InvalidItem) for value in values(answer))


async def test_whole_streams_are_items_and_fail_alone_too() -> None:
    async with serving(Shouter) as service:
        good, cut, wrong = values(await ask(service, "a\nb\n", "a\nb", 7))
    assert good == ["A", "B"]
    assert isinstance(cut, InvalidItem)
    assert isinstance(wrong, InvalidItem)


async def test_a_list_of_more_than_all_streams_is_too_large_not_too_early() -> None:
    async with serving(limits=replace(LIMITS, max_streams=2)) as service:
        with pytest.raises(RequestTooLarge, match="max_streams"):
            await ask(service, {"to": 1}, {"to": 1}, {"to": 1})


async def test_a_list_that_does_not_fit_now_is_refused_whole() -> None:
    async with serving(limits=replace(LIMITS, max_streams=3)) as service:
        stream = service.open_stream({"to": 10**6}, RequestOptions())
        with pytest.raises(Overloaded, match="max_streams") as caught:
            await ask(service, {"to": 1}, {"to": 1}, {"to": 1})
        assert caught.value.retry_after_s == 1
        assert service.stats()["totals"]["refused"] == 3
        assert service.stats()["in_flight"] == 1
        stream.close()
        assert values(await ask(service, {"to": 1}, {"to": 1}, {"to": 1})) == [[1]] * 3


async def test_who_leaves_takes_all_of_its_sequences_along() -> None:
    async with serving() as service:
        items = [{"to": 10**9}] * 6
        asking = asyncio.ensure_future(ask(service, *items))
        await until(lambda: service.loop.engine.counters.steps >= 3)
        asking.cancel()
        await asyncio.wait([asking])
        assert service.loop.engine.running == service.loop.engine.waiting == 0
        await quiet(service)
        assert model_of(service).ends == 4


async def test_who_leaves_in_the_very_moment_of_its_coming_leaves_nothing_behind() -> None:
    """Cancelled between the submission and the first look at the streams."""
    async with serving() as service:
        asking = asyncio.ensure_future(ask(service, {"to": 10**9}, {"to": 10**9}))
        asyncio.get_running_loop().call_soon(asking.cancel)
        await asyncio.wait([asking])
        assert not service.loop.streams
        assert service.loop.engine.running == service.loop.engine.waiting == 0


async def test_not_begun_by_its_deadline_is_said_of_each_item() -> None:
    async with serving(limits=replace(LIMITS, max_sequences=1)) as service:
        stream = service.open_stream({"to": 10**9}, RequestOptions())
        late = values(await ask(service, {"to": 1}, {"to": 1}, timeout_ms=5.0))
        assert all(isinstance(error, DeadlinePassed) for error in late)
        stream.close()


# -- streams -----------------------------------------------------------------------------------------


async def test_a_stream_gives_each_output_and_then_its_end() -> None:
    async with serving() as service:
        stream = service.open_stream({"to": 3}, RequestOptions())
        assert await read_all(stream) == [1, 2, 3]


async def test_a_stream_that_can_never_run_is_refused_at_the_door() -> None:
    async with serving() as service:
        with pytest.raises(InvalidItem, match="max_sequences"):
            service.open_stream({"to": 3, "cost": 5}, RequestOptions())
        assert not service.loop.streams


async def test_streams_over_the_bound_are_refused_and_let_in_when_one_ends() -> None:
    async with serving(Shouter, replace(LIMITS, max_streams=2)) as service:
        first = service.open_stream(None, RequestOptions())
        service.open_stream(None, RequestOptions())
        with pytest.raises(Overloaded, match="max_streams"):
            service.open_stream(None, RequestOptions())
        first.close()
        service.open_stream(None, RequestOptions())


async def test_end_is_called_for_streams_that_the_server_ends() -> None:
    async with serving() as service:
        streams = [service.open_stream({"to": 10**9}, RequestOptions()) for _ in range(3)]
        for stream in streams:
            await stream.read()
        model = model_of(service)
    assert model.ends == 3
    with pytest.raises(Draining):
        await read_all(streams[0])


# -- stopping ----------------------------------------------------------------------------------------


async def test_draining_refuses_newcomers_finishes_what_runs_and_cuts_what_is_left() -> None:
    async with serving() as service:
        endless = service.open_stream({"to": 10**9}, RequestOptions())
        short = asyncio.ensure_future(ask(service, {"to": 20}))
        await endless.read()
        service.drain(grace_s=0.2)
        assert not service.is_ready()
        assert service.stats()["state"] == "draining"
        with pytest.raises(Draining):
            service.open_stream({"to": 1}, RequestOptions())
        with pytest.raises(Draining):
            await ask(service, {"to": 1})
        assert len(values(await short)[0]) == 20
        with pytest.raises(Draining, match="elsewhere"):
            await read_all(endless)
        assert service.loop.engine.running == 0


async def test_draining_without_grace_lets_streams_go_on() -> None:
    async with serving() as service:
        stream = service.open_stream({"to": 50}, RequestOptions())
        service.drain()
        assert len(await read_all(stream)) == 50


async def test_health_is_the_thread_and_the_engine() -> None:
    async with serving() as service:
        service.check_health()
        broken = service.loop._runner
        service.loop._runner = type("Broken", (), {"run": staticmethod(lambda step: [])})()
        stream = service.open_stream({"to": 3}, RequestOptions())
        with pytest.raises(InternalError):
            await stream.read()
        with pytest.raises(RuntimeError, match="engine"):
            service.check_health()
        assert not service.is_ready()
        service.loop._runner = broken
    with pytest.raises(RuntimeError, match="thread"):
        service.check_health()


async def test_limits_change_in_place() -> None:
    async with serving(limits=replace(LIMITS, max_sequences=1)) as service:
        service.change_limits(replace(service.limits, max_queue_items=1, max_queue_s=0.5))
        streams = [service.open_stream({"to": 10**9}, RequestOptions()) for _ in range(2)]
        await streams[0].read()
        with pytest.raises(Overloaded, match="max_queue_items 1"):
            service.open_stream({"to": 1}, RequestOptions())
        assert service.loop.engine.max_queue_s == 0.5
        service.change_limits(replace(service.limits, max_queue_items=9, max_queue_s=None, max_streams=2))
        assert service.loop.engine.max_queue_s == float("inf")
        with pytest.raises(Overloaded, match="max_streams"):
            service.open_stream({"to": 1}, RequestOptions())
        for stream in streams:
            stream.close()


# -- warm-up and the step curve ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "useful"),
    [
        ({1: 0.010}, 1),
        ({1: 0.010, 2: 0.020, 4: 0.040, 8: 0.080}, 1),  # a larger batch gains nothing
        ({1: 0.010, 2: 0.010, 4: 0.010, 8: 0.010}, 8),  # it costs nothing
        ({1: 0.010, 2: 0.011, 4: 0.013, 8: 0.026, 16: 0.052}, 4),  # up to four it pays
        ({1: 0.010, 2: 0.011, 4: 0.013, 8: 0.0241}, 4),  # 8 % more are not worth twice the wait
        ({1: 0.010, 2: 0.011, 4: 0.013, 8: 0.020}, 8),
        ({1: 0.0, 2: 0.0}, 2),  # a clock too coarse
    ],
)
def test_the_useful_batch_is_the_smallest_near_the_best_rate(curve: Mapping[int, float], useful: int) -> None:
    assert useful_batch(curve) == useful


def test_streams_that_have_all_begun_share_the_largest_step_that_keeps_the_rate() -> None:
    curve = {1: 1.0, 16: 2.0, 64: 8.0, 256: 33.0, 512: 90.0}
    assert useful_batch(curve) == 16
    assert useful_batch(curve, is_begun=True) == 256


async def test_warm_up_bounds_the_step_by_what_is_useful_and_leaves_no_trace() -> None:
    async with serving(Counter, replace(LIMITS, max_sequences=8)) as service:
        stats = service.stats()
        assert stats["limits"]["sequences_in_step"] in (1, 2, 4, 8)
        assert stats["limits"]["max_sequences"] == 8
        assert stats["totals"]["begun"] == stats["engine"]["steps"] == stats["in_flight"] == 0
        heavy = values(await ask(service, {"to": 2, "cost": 8}, {"to": 2}))
        assert heavy == [[1, 2], [1, 2]]


async def test_streams_keep_their_slots_after_warm_up() -> None:
    async with serving(Shouter, replace(LIMITS, max_streams=12)) as service:
        streams = [service.open_stream(None, RequestOptions()) for _ in range(12)]
        for stream in streams:
            await stream.feed(b"hello\nbye\n")
        for stream in streams:
            assert await read_all(stream) == ["HELLO", "BYE"]


async def test_a_replica_is_not_ready_before_it_is_warm() -> None:
    service = ContinuousService("app", StepFront(StepModel(Counter, {})), LIMITS)
    assert not service.is_ready()
    starting = asyncio.ensure_future(service.start(Place("cpu")))
    while not starting.done():
        assert not service.is_ready()
        await asyncio.sleep(0)
    assert service.is_ready()
    await service.close()


async def test_a_queue_shorter_than_a_step_can_still_be_warmed_up() -> None:
    limits = replace(LIMITS, max_sequences=8, max_queue_items=1, max_items_per_request=1, max_queue_s=0.001)
    async with serving(Counter, limits) as service:
        assert service.is_ready()


# -- figures -----------------------------------------------------------------------------------------


def _documented() -> set[str]:
    """Dotted names of the continuous table in docs/reference/stats.md."""
    text = Path("docs/reference/stats.md").read_text(encoding="utf-8").split("## Continuous")[1]
    names: set[str] = set()
    for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        last = ""
        for name in re.findall(r"`([^`]+)`", cell):
            # `a.b`, `.c` is a.c; `a.b_p50`, `_p99` is a.b_p99
            last = last.rsplit(name[0], 1)[0] + name if name[0] in "._" else name
            names.add(last)
    return names


def _paths(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, Mapping) or prefix == "totals.requests.":
        return {prefix.rstrip(".")}
    return {path for name, part in value.items() for path in _paths(part, f"{prefix}{name}.")}


async def test_stats_have_exactly_the_documented_fields() -> None:
    async with serving() as service:
        service.count_outcome(200, route="/predict")
        await ask(service, {"to": 3})
        stats = service.stats()
    assert _paths(stats) == _documented()
    assert stats["totals"] | {"requests": None} == {
        "begun": 1, "finished": 1, "failed": 0, "cancelled": 0, "expired": 0, "refused": 0, "requests": None
    }  # fmt: skip
    assert stats["totals"]["requests"] == {"200": 1}
    assert stats["engine"]["units"] == 3
    assert stats["engine"]["step_s"]["run"] > 0.0


# -- a language model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random Llama with a byte-level tokenizer, and its transformers twin."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    twin = write_checkpoint(folder, "llama", vocab_size=257, eos_token_id=256)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}'
    )
    return folder, twin


GREEDY = Sampling(temperature=0.0)


async def _generate(service: ContinuousService, prompt: list[int], count: int) -> tuple[list[int], Any]:
    """(its tokens, its deltas)."""
    request = GenerationRequest(prompt=prompt, max_tokens=count, sampling=GREEDY, ignore_eos=True)
    (generation,) = await service.generate([request], RequestOptions())
    assert generation.prompt_tokens == len(prompt)
    stream = generation.choices[0]
    assert isinstance(stream, Stream)
    deltas = await read_all(stream)
    return stream.sequence.tokens[len(prompt) :], deltas


async def test_a_crowd_of_texts_is_what_transformers_writes(tiny: tuple[Path, Any]) -> None:
    folder, twin = tiny
    prompts = [[(7 * i + j) % 256 for j in range(5 + 9 * i)] for i in range(5)]
    async with serving(SmolLM2, replace(LIMITS, max_tokens_in_step=16), path=str(folder)) as service:
        answers = await asyncio.gather(*(_generate(service, prompt, 8) for prompt in prompts))
    for prompt, (tokens, deltas) in zip(prompts, answers, strict=True):
        assert tokens == expect(twin, prompt, 8)
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert deltas[-1].tokens == 8


async def test_a_prompt_that_never_fits_is_the_items_own_fault(tiny: tuple[Path, Any]) -> None:
    async with serving(SmolLM2, path=str(tiny[0])) as service:
        assert isinstance(service._front, LanguageFront)
        short = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        good, long = values(await ask(service, short, "x" * 5000))
    assert good["usage"]["completion_tokens"] <= 3
    assert isinstance(long, InvalidItem)


async def test_all_choices_are_let_in_or_none(tiny: tuple[Path, Any]) -> None:
    async with serving(SmolLM2, replace(LIMITS, max_streams=3), path=str(tiny[0])) as service:
        request = GenerationRequest(prompt="abc", n=2, max_tokens=400, ignore_eos=True)
        (generation,) = await service.generate([request], RequestOptions())
        with pytest.raises(Overloaded):
            await service.generate([request], RequestOptions())
        assert len(service.loop.streams) == 2
        generation.close()
        assert service.loop.engine.running == 0
        assert service.stats()["engine"]["blocks_used"] == 0
        with pytest.raises(ContextLengthExceeded):
            await service.generate(
                [replace(request, n=1), replace(request, prompt="x" * 5000)], RequestOptions()
            )
        assert not service.loop.streams


async def test_memory_for_less_than_two_blocks_stops_the_start(tiny: tuple[Path, Any]) -> None:
    service = ContinuousService(
        "app", front_of(SmolLM2, {"path": str(tiny[0])}), replace(LIMITS, kv_bytes=100)
    )
    with pytest.raises(ValueError, match="kv_bytes"):
        await service.start(Place("cpu"))
    await service.close()
