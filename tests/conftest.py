"""Fixtures shared by all tests."""

import signal
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    """Whoever starts the tests in the background has SIGINT ignored, and so would the programs they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread, minutes of it where the cores are busy."""
    import torch  # here: the core's tests do without it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
