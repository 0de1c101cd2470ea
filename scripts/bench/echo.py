"""The floor that `noop` is measured against: an ASGI application that answers with what it got.

A plain Ray Serve deployment, none of ours: the cheapest thing that can stand behind the same HAProxy.
"""

from typing import Any

from ray import serve


class _Echo:
    """A callable object: Ray would take a plain function for a factory of applications."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = (await receive()).get("body", b"")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@serve.deployment(max_ongoing_requests=2048, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(_Echo())
class Echo:
    pass


app = Echo.bind()  # type: ignore[attr-defined]
