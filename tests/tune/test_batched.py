"""Load that is taken back ends, whatever the service makes of it."""

import asyncio

from scripts.tune.batched import Batched, _Tape


class Deaf(Batched):
    """Its answers come just as they are cancelled, as Python 3.11's wait_for may have it."""

    def __init__(self) -> None: ...

    async def _answered(self, tape: _Tape) -> bool:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            pass
        return True


async def test_client_whose_cancelling_was_dropped_ends_with_its_tape() -> None:
    tape = _Tape()
    client = asyncio.ensure_future(Deaf()._client(tape))
    await asyncio.sleep(0)
    tape.is_over = True
    client.cancel()
    done, _ = await asyncio.wait([client], timeout=5.0)
    assert done
