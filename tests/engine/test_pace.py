"""What may run beside those that talk, learned from how long steps took."""

import random
from statistics import median

import pytest

from deployments.engine.pace import FIRST_CHUNK, SMALLEST_CHUNK, STALL, Pace


def learned(pace: Pace, *, unit_s: float, talking: int = 8, base_s: float = 0.02, steps: int = 100) -> int:
    """The chunk after `steps` steps of a machine that takes base_s + unit_s a unit."""
    for _ in range(20):
        pace.observe(talking, 0, base_s + unit_s * talking)
    for _ in range(steps):
        chunk = pace.chunk(talking)
        pace.observe(talking, chunk, base_s + unit_s * (talking + chunk))
    return pace.chunk(talking)


def test_nobody_talks_so_the_whole_budget_is_the_prompts() -> None:
    assert Pace(256).chunk(0) == 256


def test_before_anything_is_learned_a_chunk_is_small() -> None:
    assert Pace(256).chunk(8) == FIRST_CHUNK


def test_chunks_and_talkers_together_stay_within_the_budget() -> None:
    pace = Pace(40)
    assert pace.chunk(30) == 10
    assert pace.chunk(40) == 0
    assert pace.chunk(50) == 0


@pytest.mark.parametrize("unit_s", [0.0003, 0.0006, 0.001])
def test_a_chunk_grows_until_the_gap_is_as_long_as_allowed(unit_s: float) -> None:
    chunk = learned(Pace(1000), unit_s=unit_s)
    plain_s = 0.02 + unit_s * 8
    assert (plain_s + unit_s * chunk) / plain_s == pytest.approx(STALL, rel=0.05)


def test_a_chunk_never_passes_the_budget() -> None:
    assert learned(Pace(64), unit_s=1e-9) == 64 - 8


def test_a_chunk_never_falls_below_the_smallest_so_prompts_always_go_on() -> None:
    assert learned(Pace(256), unit_s=1.0) == SMALLEST_CHUNK


def test_a_budget_below_the_smallest_chunk_is_kept() -> None:
    assert learned(Pace(12), unit_s=1.0) == 4


def test_a_short_end_of_a_prompt_weighs_little() -> None:
    pace = Pace(256)
    pace.observe(8, 0, 0.02)
    pace.observe(8, 1, 0.1)  # 80 ms for one unit
    assert pace.chunk(8) == FIRST_CHUNK - 1


def test_steps_without_talkers_teach_nothing() -> None:
    pace = Pace(256)
    for _ in range(50):
        pace.observe(0, 256, 10.0)
    assert pace.chunk(8) == FIRST_CHUNK


def test_with_nothing_to_compare_with_the_chunk_stays() -> None:
    pace = Pace(256)
    for _ in range(50):
        pace.observe(8, 32, 10.0)
    assert pace.chunk(8) == FIRST_CHUNK


def test_one_slow_step_takes_little_and_is_made_up_for() -> None:
    pace = Pace(1000)
    before = learned(pace, unit_s=0.0006)
    pace.observe(8, before, 3.0)
    assert pace.chunk(8) >= 0.8 * before
    assert learned(pace, unit_s=0.0006) == pytest.approx(before, rel=0.1)


def test_noise_does_not_wear_the_chunk_down() -> None:
    pace, noise = Pace(1000), random.Random(3)
    quiet = learned(pace, unit_s=0.0006)
    chunks = []
    for number in range(400):
        chunk = pace.chunk(8) if number % 4 else 0
        pace.observe(8, chunk, (0.0248 + 0.0006 * chunk) * noise.choice((0.8, 0.9, 1.0, 1.0, 1.1, 2.5)))
        chunks.append(pace.chunk(8))
    assert median(chunks[100:]) > 0.6 * quiet


def test_a_machine_that_became_slower_is_learned_anew() -> None:
    pace = Pace(1000)
    fast = learned(pace, unit_s=0.0003)
    assert learned(pace, unit_s=0.002) < fast
