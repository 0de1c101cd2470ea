"""Talks to the running HAProxy through its admin socket: close the door, count the work in hand.

Ray gives each node's HAProxy a folder of its own under ours, so there is one socket for each.
Commands: HAProxy management guide 9.3, "Unix Socket commands". Must not know: Ray.
"""

import csv
import io
import socket
from pathlib import Path

_TIMEOUT_S = 1.0
# The wrapper's config answers 503 where this process-wide variable is set (haproxy_config.py).
CLOSE_DOOR = "experimental-mode on; set var proc.draining int(1)"


def sockets(folder: Path) -> list[Path]:
    """The admin sockets under a server's HAProxy folder."""
    return sorted(path for path in folder.glob("*/a") if path.is_socket())


def command(path: Path, text: str) -> str:
    """One command's answer. Raises OSError where nobody answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(_TIMEOUT_S)
        channel.connect(str(path))
        channel.sendall(text.encode() + b"\n")
        chunks = []
        while chunk := channel.recv(65_536):
            chunks.append(chunk)
    return b"".join(chunks).decode("utf-8", "replace")


def close_door(folder: Path) -> bool:
    """New requests get 503 from now on, within a millisecond; True where every HAProxy took it."""
    found = sockets(folder)
    try:
        return bool(found) and all(not command(path, CLOSE_DOOR).strip() for path in found)
    except OSError:
        return False


def requests_in_hand(folder: Path) -> int | None:
    """Requests that applications are working on (idle connections don't count); None: unknown."""
    try:
        return sum(parse_in_hand(command(path, "show stat -1 2 -1")) for path in sockets(folder))
    except OSError:
        return None


def parse_in_hand(stat: str) -> int:
    """Sum of the application backends' current sessions in a `show stat` answer."""
    rows = csv.DictReader(io.StringIO(stat.removeprefix("# ")))
    return sum(
        int(row["scur"] or 0)
        for row in rows
        if row["svname"] == "BACKEND" and row["pxname"].startswith("http-")
    )
