"""A web server of somebody else's that is told of events: keeps what comes and answers what it is told to."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Told:
    """A message as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The body's value."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    def is_signed_with(self, secret: str) -> bool:
        """Check the signature as docs/rest.md tells receivers to."""
        parts = dict(part.split("=", 1) for part in self.headers["mintweb-signature"].split(","))
        signed = f"{parts['t']}.".encode() + self.body
        return hmac.compare_digest(hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest(), parts["v1"])


@dataclass
class Receiver:
    """What came, and the statuses of the next answers; 200 after those."""

    port: int
    told: list[Told] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    location: str = ""

    @property
    def url(self) -> str:
        """Where to send messages."""
        return f"http://127.0.0.1:{self.port}/hook?for=me"


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): text for name, text in self.headers.items()}
            receiver.told.append(Told(self.path, headers, body))
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
            if receiver.location:
                self.send_header("location", receiver.location)
            self.end_headers()
            self.wfile.write(b"thanks")

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # as many connections as come at once

    with Server(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
