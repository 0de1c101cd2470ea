"""Keeps Ray's own ports on loopback and apart from another server's, where Ray 2.60 has no setting.

Ray replaces a node address of 127.0.0.1 by the machine's own ("make sure localhost isn't resolved
to the loopback ip"), and then GCS, raylet, workers and agents listen on all interfaces. With the
address left as it is, Ray's C++ side binds all of them to loopback (`listen_to_localhost_only`).
What remains is each replica's gRPC port: it takes pickles without asking for the token, and its
address is a literal; the hook below replaces it in every worker. For one machine only: a second
node could not reach this one. Each patch checks that what it replaces is there, and warns if not.
"""

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

WORKER_HOOK = "serve_app.loopback.keep_replica_on_loopback"
_ANY, _LOOPBACK = "[::]:", "127.0.0.1:"


def keep_ray_on_loopback() -> None:
    """Call before ray.init(_node_ip_address="127.0.0.1"), in the process that starts Ray."""
    from ray._private import services

    _replace(services, "resolve_ip_for_localhost", _as_given)
    _replace(services, "get_node_ip_address", _loopback)


def set_agent_port(port: int) -> None:
    """The one fixed port (52365) that neither ray.init nor a variable can move. Before ray.init."""
    from ray._private import parameter

    with_port = functools.partial(parameter.RayParams, dashboard_agent_listen_port=port)
    _replace(parameter, "RayParams", with_port)


def keep_replica_on_loopback() -> None:
    """Ray calls this at the start of every worker process (runtime_env, WORKER_HOOK)."""
    from ray.serve._private import replica

    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is not None:
        _replace(replica, "add_port_to_grpc_server", functools.partial(_bind_on_loopback, bind))


def _bind_on_loopback(bind: Any, server: Any, address: str) -> Any:
    if address.startswith(_ANY):
        address = _LOOPBACK + address.removeprefix(_ANY)
    return bind(server, address)


def _replace(module: Any, name: str, stand_in: Any) -> None:
    if not hasattr(module, name):
        logger.warning("%s.%s is gone: some of Ray's ports stay open", module.__name__, name)
        return
    setattr(module, name, stand_in)


def _as_given(host: str) -> str:
    return host


def _loopback(*args: Any, **kwargs: Any) -> str:
    return "127.0.0.1"
