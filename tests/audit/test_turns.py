"""Threads take turns; locks, errors and ends don't stop the others."""

import gc
import threading

import pytest

from deployments.audit import turns as turns_module
from deployments.audit.schedules import Inside, Lockstep
from deployments.audit.turns import Stuck, Turns


def test_a_thread_that_waits_for_a_lock_is_passed_over() -> None:
    turns, lock = Turns(Lockstep(1)), threading.Lock()
    inside = []

    def call(name: str) -> str:
        with lock:
            inside.append(name)
            turns.pause("in the lock")
            inside.append(name)
        turns.pause("behind it")
        return name

    ended = turns.run([lambda: call("a"), lambda: call("b")])
    assert [end.value for end in ended] == ["a", "b"]
    assert inside == ["a", "a", "b", "b"]


def test_what_a_call_raises_is_its_own_end() -> None:
    turns = Turns(Lockstep(1))

    def fails() -> None:
        turns.pause("first")
        raise SystemExit(3)

    def goes_on() -> int:
        for _ in range(5):
            turns.pause("on")
        return 7

    failed, other = turns.run([fails, goes_on])
    assert isinstance(failed.error, SystemExit)
    assert (other.value, other.error) == (7, None)


def test_threads_that_wait_for_each_other_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "STUCK_AFTER_S", 0.4)
    turns, locks = Turns(Lockstep(1)), [threading.Lock(), threading.Lock()]

    def call(first: int) -> None:
        with locks[first]:
            turns.pause("one lock held")
            # Not for ever: the thread must end with the test.
            if locks[1 - first].acquire(timeout=2.0):
                locks[1 - first].release()

    with pytest.raises(Stuck, match="one lock held"):
        turns.run([lambda: call(0), lambda: call(1)])


def test_other_threads_pass_a_pause() -> None:
    turns = Turns(Inside((1,)))

    def call() -> None:
        helper = threading.Thread(target=lambda: turns.pause("not ours"))
        helper.start()
        helper.join()
        turns.pause("ours")

    turns.run([call, call])
    assert [point.what for point in turns.points] == ["ours", "ours"]


def test_no_garbage_is_collected_while_threads_take_turns() -> None:
    turns = Turns(Lockstep(1))
    seen: list[bool] = []

    def call() -> None:
        seen.append(gc.isenabled())
        turns.pause("here")

    turns.run([call, call])
    assert seen == [False, False]
    assert gc.isenabled()


def test_thread_that_is_slow_to_wake_up_is_not_taken_for_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "POLL_S", 0.0001)
    monkeypatch.setattr(turns_module, "BLOCKED_AFTER_S", -1.0)
    monkeypatch.setattr(turns_module, "_is_asleep", lambda thread: True)
    monkeypatch.setattr(turns_module, "_cpu_s", lambda thread: 0.0)
    monkeypatch.setattr(turns_module, "STUCK_AFTER_S", 5.0)
    is_over = threading.Event()

    def keep_the_interpreter_busy() -> None:
        while not is_over.is_set():
            sum(range(1000))

    hog = threading.Thread(target=keep_the_interpreter_busy)
    hog.start()
    turns = Turns(Lockstep(1))

    def call() -> None:
        for number in range(100):
            turns.pause(str(number))

    try:
        assert all(end.error is None for end in turns.run([call, call, call]))
    finally:
        is_over.set()
        hog.join()
