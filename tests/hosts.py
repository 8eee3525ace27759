"""A host on this machine that behaves as badly as the real ones do."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from scfm_circuits.common import fetch as fetching

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Host(ThreadingHTTPServer):
    """Serves `content` at any path. faults: for each request in turn what goes wrong, or "".

    `cut:n`: the connection ends after n bytes of the body; a number: that status; `whole`: a range
    is answered with the whole file; `shifted`: with another part.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.faults: list[str] = []
        self.seen: list[str | None] = []
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that leaves is no news."""


class Answer(BaseHTTPRequestHandler):
    server: Host
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        host = self.server
        host.seen.append(self.headers.get("Range"))
        fault = host.faults.pop(0) if host.faults else ""
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        ranged = asked and fault != "whole"
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranged else 0
        start += 7 if fault == "shifted" else 0
        body = host.content[start:]
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range",
                             f"bytes {start}-{len(host.content) - 1}/{len(host.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault.startswith("cut:"):
            self.wfile.write(body[: int(fault[4:])])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)


def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host that is asked without waiting between the tries."""
    waits: list[float] = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    server = Host()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
