"""Free ports for a server, so that two run on one machine beside each other.

A server takes one block of 500 ports below the kernel's ephemeral range; every port it listens on
but the HTTP port itself and Ray's gRPC lies in it, which also makes firewalls simple. The first port of a
block is its lock: the launcher listens on it for as long as it lives, so the kernel frees it
whatever happens. Must not know: Ray's API (only the names of its environment variables).
"""

import errno
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

BLOCK_PORTS = 500
# 10002-19999 are Ray's workers', 30000-31000 the replicas' of a plain `serve run`, 32768 and up the
# kernel's.
FIRST_BLOCK, LAST_BLOCK = 20_000, 29_500
_HAPROXY_METRICS, _HAPROXY_STATS, _DASHBOARD, _RAY_METRICS, _AGENT = 1, 2, 3, 4, 5
_FALLBACK_HTTP, _FALLBACK_GRPC, _AUTOSCALER_METRICS, _DASHBOARD_METRICS = 6, 7, 8, 9
_REPLICAS = 10  # the rest is the replicas': one each, and those resting in quarantine


class PortError(Exception):
    """No port to be had; the message says which and what to do."""


@dataclass(slots=True)
class PortBlock:
    """Ports `first` to `first + 499`, ours while `lock` is open."""

    first: int
    lock: socket.socket

    @property
    def dashboard(self) -> int:
        return self.first + _DASHBOARD

    @property
    def ray_metrics(self) -> int:
        return self.first + _RAY_METRICS

    @property
    def agent(self) -> int:
        return self.first + _AGENT

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Name the block's ports to Ray; what the environment names already stays."""
        for key, offset in (
            ("RAY_SERVE_HAPROXY_METRICS_PORT", _HAPROXY_METRICS),
            ("RAY_SERVE_HAPROXY_STATS_PORT", _HAPROXY_STATS),
            ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", _FALLBACK_HTTP),
            ("RAY_SERVE_FALLBACK_PROXY_GRPC_PORT", _FALLBACK_GRPC),
            ("AUTOSCALER_METRIC_PORT", _AUTOSCALER_METRICS),
            ("DASHBOARD_METRIC_PORT", _DASHBOARD_METRICS),
            ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", _REPLICAS),
            ("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", BLOCK_PORTS),
        ):
            environ.setdefault(key, str(self.first + offset))

    def close(self) -> None:
        self.lock.close()


def take_block() -> PortBlock:
    """The first block that no other server holds and in which nobody listens at the low end."""
    for first in range(FIRST_BLOCK, LAST_BLOCK + 1, BLOCK_PORTS):
        lock = _listen("127.0.0.1", first)
        if lock is None:
            continue
        if all(is_free("127.0.0.1", first + offset) for offset in range(1, 50)):
            return PortBlock(first, lock)
        lock.close()
    raise PortError(
        f"no block of {BLOCK_PORTS} free ports between {FIRST_BLOCK} and {LAST_BLOCK}: "
        "stop another server, or see with `ss -ltn` who listens there"
    )


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on host:port now (others' TIME_WAIT doesn't count)."""
    probe = _listen(host, port)
    if probe is None:
        return False
    probe.close()
    return True


def next_free(host: str, port: int) -> int:
    """The next port after `port` that is free, for the advice in an error message."""
    return next((p for p in range(port + 1, 65_536) if is_free(host, p)), port)


def _listen(host: str, port: int) -> socket.socket | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_STREAM)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        probe.listen(1)
    except OSError as error:
        probe.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return None
        raise PortError(f"can't listen on {host}:{port}: {error.strerror}") from error
    return probe
