"""A small HTTP server that gives the answers a real vLLM server gave to the same requests, and fails when told to.

The exchanges in `wire/` were captured by `capture.py`.
"""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

EXCHANGES = Path(__file__).parent / "wire"
ADAPTER = "checkpoints/adapter"


def key_of(body: dict[str, Any]) -> str:
    """Return what makes a completion request the same: all of it, but for the name of the adapter."""
    model = ADAPTER if str(body["model"]).startswith("checkpoints/") else body["model"]
    return json.dumps({**body, "model": model}, sort_keys=True)


class Replay:
    """Answers at `url` until `kill`; `requests` are those it got, `loaded` the adapters it knows.

    Samples, but for probes, are held back until `may_answer`; `is_frozen` has it answer nothing else either. Its facts
    are said to be encoded as `said_encoding`, which they are not.
    """

    def __init__(self, *, port: int = 0, model: str = "mintweb/tiny") -> None:
        exchanges = [json.loads(path.read_text()) for path in sorted(EXCHANGES.glob("*.json"))]
        self.answers = {key_of(one["request"]): one for one in exchanges if "request" in one}
        self.facts = {one["path"]: one["answer"] for one in exchanges if "path" in one}
        self.serve(model)
        self.refused_adapters = ""
        self.has_mixed_up_base = False
        self.said_encoding = ""
        self.num_looks = 0
        self.loaded: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.held = threading.Semaphore(0)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.is_frozen, self.thaw = threading.Event(), threading.Event()
        self._sockets: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", port), self)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def serve(self, model: str) -> None:
        """Serve a model of this name."""
        for card in self.facts["/v1/models"]["data"]:
            card["id"] = card["root"] = model

    def completions(self) -> list[dict[str, Any]]:
        """Return the samples that were asked for, but for probes."""
        return [body for path, body in self.requests if path == "/v1/completions" and not is_probe(body)]

    def kill(self) -> None:
        """Die: no connection is answered any more."""
        self._server.shutdown()
        self._server.server_close()
        for held in list(self._sockets):
            try:
                held.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.may_answer.set()
        self.is_frozen.clear()
        self._thread.join()


def is_probe(body: dict[str, Any]) -> bool:
    """Say whether a request is the one that a server is looked at with."""
    return body["max_tokens"] == 1 and body.get("prompt_logprobs") == 0


def _shifted(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer of other weights."""
    moved: dict[str, Any] = json.loads(json.dumps(answer))
    for row in moved["choices"][0]["prompt_logprobs"][1:]:
        for score in row.values():
            score["logprob"] -= 1.0
    return moved


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], replay: Replay) -> None:
        super().__init__(address, _Handler)
        self.replay = replay

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that vanish are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.replay._sockets.add(self.connection)

    def finish(self) -> None:
        self.server.replay._sockets.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        replay = self.server.replay
        while replay.is_frozen.is_set():
            replay.thaw.wait(0.01)
        if self.path == "/health":
            replay.num_looks += 1
            self._answer(200, b"")
            return
        self._answer(200, json.dumps(replay.facts[self.path]).encode(), encoding=replay.said_encoding)

    def do_POST(self) -> None:
        replay = self.server.replay
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        replay.requests.append((self.path, body))
        if self.path == "/v1/completions":
            self._complete(body)
        elif self.path == "/v1/load_lora_adapter":
            self._load(body)
        else:
            known = replay.loaded.pop(body["lora_name"], None)
            self._answer(200 if known else 404, b"Success")

    def _load(self, body: dict[str, str]) -> None:
        replay = self.server.replay
        if replay.refused_adapters:
            self._error(400, replay.refused_adapters)
        elif not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            self._error(
                404, f"Loading lora {body['lora_name']} failed: No adapter found for {body['lora_path']}"
            )
        elif body["lora_name"] in replay.loaded:
            self._error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
        else:
            replay.loaded[body["lora_name"]] = body["lora_path"]
            self._answer(200, b"Success")

    def _complete(self, body: dict[str, Any]) -> None:
        replay = self.server.replay
        if not is_probe(body):
            replay.held.release()
            replay.may_answer.wait()
        known_models = {card["id"] for card in replay.facts["/v1/models"].get("data", ())} | set(
            replay.loaded
        )
        if body["model"] not in known_models:
            self._error(404, f"The model `{body['model']}` does not exist.")
            return
        if is_probe(body) and replay.has_mixed_up_base and replay.loaded:
            self._answer(200, json.dumps(_shifted(replay.answers[key_of(body)]["answer"])).encode())
            return
        known = replay.answers.get(key_of(body))
        if known is None:
            self._error(400, "this request was not captured")
            return
        content = known["answer"]
        self._answer(known["status"], (content if isinstance(content, str) else json.dumps(content)).encode())

    def _error(self, status: int, message: str) -> None:
        self._answer(status, json.dumps({"error": {"message": message, "code": status}}).encode())

    def _answer(self, status: int, content: bytes, *, encoding: str = "") -> None:
        self.send_response(status)
        if encoding:
            self.send_header("content-encoding", encoding)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
