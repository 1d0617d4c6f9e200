"""A TCP proxy that can swallow everything, cut connections, and be slow; it can also watch what passes."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

Watch = Callable[[bool, bytes], None]


class Proxy:
    """Listens on a port of this machine while its `with` lasts, and passes on to whatever `connect` returns.

    `watch` is called with whether the bytes come from the client, and the bytes. `delay_s` holds each piece back on
    its way; `cut_share` is the probability that its connection is reset instead.
    """

    def __init__(self, connect: Callable[[], socket.socket], *, watch: Watch | None = None) -> None:
        self.delay_s = 0.0
        self.cut_share = 0.0
        self.num_cut = 0
        self._connect = connect
        self._watch = watch
        self._is_open = threading.Event()
        self._random = random.Random(1)
        self._sockets: set[socket.socket] = set()

    def __enter__(self) -> Proxy:
        self._is_open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()
        self._is_open.set()

    @contextlib.contextmanager
    def swallowing(self) -> Iterator[None]:
        """Take everything and pass on nothing, until the end of the `with`: then it goes on its way."""
        self._is_open.clear()
        try:
            yield
        finally:
            self._is_open.set()

    def cut(self) -> None:
        """Reset every connection."""
        for one in list(self._sockets):
            self._reset(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._sockets.add(client)
        self._is_open.wait()
        try:
            server = self._connect()
        except OSError:
            self._reset(client)
            return
        self._sockets.add(server)
        back = threading.Thread(target=self._pass_on, args=(server, client, False), daemon=True)
        back.start()
        self._pass_on(client, server, True)
        back.join()
        for one in (client, server):
            self._sockets.discard(one)
            one.close()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_clients: bool) -> None:
        """Pass on until the source ends, and that too: a reset would take what was not read yet with it."""
        try:
            while data := source.recv(65536):
                time.sleep(self.delay_s)
                self._is_open.wait()
                if self._random.random() < self.cut_share:
                    self.num_cut += 1
                    raise ConnectionResetError
                if self._watch is not None:
                    self._watch(is_clients, data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            self._reset(source)
            self._reset(target)

    def _reset(self, one: socket.socket) -> None:
        self._sockets.discard(one)
        with contextlib.suppress(OSError):  # it may be closed already, or its other end be gone
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.shutdown(socket.SHUT_RD)  # wakes the thread that reads it; what is sent is a reset
        one.close()
