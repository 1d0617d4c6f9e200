"""A process that holds its part of the base models and repeats the engine calls of its group's first process.

`python -m gpuworker.follower PIPE POSITION SIZE MEETING DEVICE TIMEOUT_S`, started by `gpuworker.group`. It ends when
the pipe does. Calls come as pickles, through a pipe that only the two processes hold; no network carries them.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import shutil
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import torch

from gpuworker.engine import tensor_parallel
from gpuworker.engine.adapters import Share
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import BaseModelError, EngineError
from gpuworker.engine.tensor_parallel import ProcessGroup
from gpuworker.group_calls import Call, Load, Loaded, Message

logger = logging.getLogger(__name__)

_LOAD_APART_S: Final = 60.0
"""How much later than this process the first one may find that a model cannot be loaded."""


class Follower:
    """Repeats calls; an error that the first process need not have met ends the process."""

    def __init__(self, group: ProcessGroup, device: str, messages: queue.SimpleQueue[Message]) -> None:
        self._group = group
        self._device = device
        self._messages = messages
        self._engines: list[Engine] = []

    def run(self) -> None:
        """Repeat calls for ever."""
        while True:
            message = self._messages.get()
            if isinstance(message, Load):
                self._load(message)
            else:
                assert isinstance(message, Call)
                self._call(message)

    def _load(self, load: Load) -> None:
        torch.set_num_threads(load.num_threads)
        error = ""
        try:
            engine = Engine.load(
                load.directory,
                device=self._device,
                dtype=load.dtype,
                adapter_memory=load.adapter_memory,
                group=self._group,
            )
            self._engines.append(engine)
        except BaseModelError as failure:
            error = str(failure)
        # Where only this process failed, the first one waits for it in a sum.
        first = self._messages.get(timeout=_LOAD_APART_S if error else None)
        if not isinstance(first, Loaded) or first.succeeded == bool(error):
            raise RuntimeError(f"only some processes could load {load.directory}: {error or 'others failed'}")

    def _call(self, call: Call) -> None:
        engine = self._engines[call.engine]
        try:
            getattr(engine.sampler if call.is_sampler else engine, call.method)(*call.args, **call.kwargs)
        except EngineError:
            logger.debug("%s was refused, as it was in the first process", call.method)


def main() -> None:
    """Be a follower until the first process ends."""
    pipe, position, size, meeting, device, timeout_s = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_IGN
        )  # the first process lets running calls end, then closes the pipe
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    reading = Connection(int(pipe), writable=False)
    folder = Path(meeting).parent
    threading.Thread(target=_read, args=(reading, messages, folder), name="calls", daemon=True).start()
    try:
        share = Share(int(position), int(size))
        group = tensor_parallel.join(share, Path(meeting), device=device, timeout_s=float(timeout_s))
        Follower(group, device, messages).run()
    except BaseException:
        logger.exception("process %s of %s of a group ends, and the group with it", int(position) + 1, size)
        os._exit(3)


def _read(reading: Connection, messages: queue.SimpleQueue[Message], folder: Path) -> None:
    """Take calls as they come, so that the first process never waits for the pipe; end with it.

    A first process that was killed has left the folder where the group met.
    """
    try:
        while True:
            messages.put(pickle.loads(reading.recv_bytes()))  # noqa: S301 - from the process that started this one
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


if __name__ == "__main__":
    main()
