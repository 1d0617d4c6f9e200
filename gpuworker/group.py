"""A worker's group: the processes beside this one that hold parts of its base models and repeat its engine calls.

This process stays an ordinary worker; its engines tell the followers of each call before they do it themselves.
Nothing goes on when one of them ends: `on_lost` is to end this process too, and the next one begins with new
followers. One group in a process, as torch.distributed has it.
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from gpuworker.engine import tensor_parallel
from gpuworker.engine.adapters import Share
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import BaseModelError, EngineError
from gpuworker.engine.residency import AdapterMemory
from gpuworker.group_calls import Call, Load, Loaded, Message

# Whatever changes an engine's state or goes through the model. The rest is asked of this process alone.
ENGINE_CALLS: Final = (
    "create_adapter",
    "drop_adapter",
    "forward_backward",
    "optim_step",
    "export_state",
    "import_state",
    "keep_sampler",
    "load_sampler",
    "use_sampler",
    "drop_sampler",
)
SAMPLER_CALLS: Final = ("submit", "cancel", "step")
_END_S: Final = 10.0


@dataclass(frozen=True)
class _Follower:
    process: subprocess.Popen[bytes]
    pipe: Connection


class WorkerGroup:
    """The followers of this process.

    Args:
        devices: one for each process, this one first.
        timeout_s: how long one process may keep the others waiting.
        on_lost: called from any thread, perhaps more than once, with the reason, when the group cannot go on.
    """

    def __init__(self, devices: Sequence[str], *, timeout_s: float, on_lost: Callable[[str], None]) -> None:
        self._device = devices[0]
        self._on_lost = on_lost
        self._is_closing = False
        self._lock = threading.RLock()
        self._is_telling = False
        self._num_engines = 0
        self._folder = Path(tempfile.mkdtemp(prefix="mintweb-group-"))  # only its owner can enter
        share, meeting = Share(0, len(devices)), self._folder / "meeting"
        self._followers = [
            _start(Share(index, share.size), meeting, device, timeout_s)
            for index, device in enumerate(devices)
            if index > 0
        ]
        for follower in self._followers:
            threading.Thread(target=self._watch, args=(follower.process,), daemon=True).start()
        self._group = tensor_parallel.join(share, meeting, device=devices[0], timeout_s=timeout_s)

    @property
    def process_ids(self) -> list[int]:
        """Return the followers' process ids."""
        return [follower.process.pid for follower in self._followers]

    def load(self, directory: Path, *, dtype: str, adapter_memory: AdapterMemory) -> Engine:
        """Load a base model, by its absolute path, in all processes and return this one's engine, whose calls the others repeat.

        Raises:
            BaseModelError: no process can load it; see `Engine.load`.
        """
        self._send(
            Load(
                directory=directory,
                dtype=dtype,
                adapter_memory=adapter_memory,
                num_threads=torch.get_num_threads(),
            )
        )
        try:
            engine = Engine.load(
                directory, device=self._device, dtype=dtype, adapter_memory=adapter_memory, group=self._group
            )
        except BaseModelError:
            self._send(Loaded(False))
            raise
        self._send(Loaded(True))
        self._lead(engine)
        return engine

    def close(self) -> None:
        """End the followers."""
        self._is_closing = True
        for follower in self._followers:
            follower.pipe.close()
        for follower in self._followers:
            try:
                follower.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
        self._group.leave()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lead(self, engine: Engine) -> None:
        """Have an engine tell the followers what it is asked to do."""
        number = self._num_engines
        self._num_engines += 1
        for is_sampler, methods in ((False, ENGINE_CALLS), (True, SAMPLER_CALLS)):
            owner = engine.sampler if is_sampler else engine
            for method in methods:
                call = partial(Call, engine=number, is_sampler=is_sampler, method=method)
                setattr(owner, method, self._told(getattr(owner, method), call))

    def _told(self, method: Callable[..., Any], call: Callable[..., Call]) -> Callable[..., Any]:
        """Return a method that tells the followers first; what it calls in turn they call by themselves."""

        def tell_and_do(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if self._is_telling:
                    return method(*args, **kwargs)
                self._send(call(args=args, kwargs=kwargs))
                self._is_telling = True
                try:
                    return method(*args, **kwargs)
                except EngineError:
                    raise
                except Exception as error:
                    self._lose(f"the group is out of step: {type(error).__name__}: {error}")
                    raise
                finally:
                    self._is_telling = False

        return tell_and_do

    def _send(self, message: Message) -> None:
        content = pickle.dumps(message)
        try:
            for follower in self._followers:
                follower.pipe.send_bytes(content)
        except OSError as error:
            self._lose(f"a process of the group takes no calls: {error}")
            raise

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._is_closing:
            self._lose(f"process {process.pid} of the group ended with status {status}")

    def _lose(self, reason: str) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # `on_lost` may not return
        self._on_lost(reason)


def _start(share: Share, meeting: Path, device: str, timeout_s: float) -> _Follower:
    reading, writing = Pipe(duplex=False)
    arguments = (reading.fileno(), share.position, share.size, meeting, device, timeout_s)
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuworker.follower", *map(str, arguments)],
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.DEVNULL,
        pass_fds=(reading.fileno(),),
    )
    reading.close()
    return _Follower(process, writing)
