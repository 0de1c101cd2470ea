"""One bad item fails alone, whatever it raises."""

import asyncio
from collections.abc import Sequence

import pytest

from deployments.core.errors import InvalidItem, ModelBroken, ModelFailed
from deployments.core.isolate import Isolated, run_isolated


def isolate(run: object, examples: Sequence[int]) -> Isolated:
    return run_isolated(run, examples, is_out_of_memory=lambda e: isinstance(e, MemoryError))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "raised",
    [ValueError, SystemExit, KeyboardInterrupt, asyncio.CancelledError, StopIteration, GeneratorExit],
)
def test_culprits_are_found_and_the_others_get_their_answers(raised: type[BaseException]) -> None:
    def run(batch: Sequence[int]) -> list[int]:
        if any(x in (3, 11) for x in batch):
            raise raised
        return [10 * x for x in batch]

    report = isolate(run, range(16))
    assert [r.output for r in report.results if r.error is None] == [
        10 * i for i in range(16) if i not in (3, 11)
    ]
    assert [i for i, r in enumerate(report.results) if isinstance(r.error, ModelFailed)] == [3, 11]
    assert report.runs <= 2 * 2 * 4 + 1


def test_out_of_memory_is_split_and_its_size_reported() -> None:
    def run(batch: Sequence[int]) -> list[int]:
        if len(batch) > 4:
            raise MemoryError
        return list(batch)

    report = isolate(run, range(16))
    assert [r.output for r in report.results] == list(range(16))
    assert report.out_of_memory == [(0, 16), (0, 8), (8, 16)]
    assert report.fitted == [(0, 4), (4, 8), (8, 12), (12, 16)]


def test_an_item_that_never_fits_is_the_callers_to_shrink() -> None:
    def run(batch: Sequence[int]) -> list[int]:
        raise MemoryError

    (result,) = isolate(run, [1]).results
    assert isinstance(result.error, InvalidItem)


def test_a_wrong_output_count_is_the_models_error_and_is_not_retried() -> None:
    def run(batch: Sequence[int]) -> list[int]:
        raise ModelBroken("returned 3 outputs for a batch of 4")

    report = isolate(run, range(4))
    assert report.runs == 1
    assert all(isinstance(r.error, ModelBroken) for r in report.results)


def test_messages_hold_no_text_of_the_exception() -> None:
    def run(batch: Sequence[int]) -> list[int]:
        raise ValueError("/secret/path of another caller")

    (result,) = isolate(run, [1]).results
    assert result.error is not None
    assert "secret" not in result.error.message


def test_an_exception_that_can_not_be_printed_takes_nobody_along() -> None:
    class Mute(RuntimeError):
        def __str__(self) -> str:
            raise RuntimeError

    def run(batch: Sequence[int]) -> list[int]:
        if 2 in batch:
            raise Mute
        return list(batch)

    report = run_isolated(run, range(4), is_out_of_memory=lambda e: "memory" in str(e))
    assert [r.output for r in report.results if r.error is None] == [0, 1, 3]
