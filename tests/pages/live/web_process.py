"""What runs in the web process of a test; imported by its parent, so that each begins at once."""

from __future__ import annotations

import ctypes
import os
import signal

import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.websockets import websockets_sansio_impl

from mintweb.asgi import application

_PR_SET_PDEATHSIG = 1


def serve(port: int) -> None:
    """Answer until a signal comes or the parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    uvicorn.run(
        application,
        port=port,
        loop="uvloop",
        http=httptools_impl.HttpToolsProtocol,
        ws=websockets_sansio_impl.WebSocketsSansIOProtocol,
        log_level="warning",
        access_log=False,
    )
