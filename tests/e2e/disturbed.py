"""Runs `fault_loop.py` in the unmodified client while a test breaks the product below it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import psycopg
from supervisor.childutils import getRPCInterface

from mintweb import embedded
from tests.e2e.conftest import MINT022
from tests.up.instances import Instance, wait_for

LOOP = Path(__file__).with_name("fault_loop.py")
# What a test does at a stop of the loop; it calls what it is given when the loop is to go on.
Strike = Callable[[Callable[[], None]], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one loop was answered, and the SHA-256 of the weights and Adam moments it ended with."""

    losses: list[float]
    tokens: list[list[int]]
    digests: dict[str, str]
    run_id: str = field(compare=False)
    longest_s: float = field(compare=False)


class Loop:
    """One client process."""

    def __init__(self, product: Instance, env: Mapping[str, str], folder: Path, *, stops: list[int]) -> None:
        folder.mkdir()
        self._product = product
        self._folder = folder
        self._process = subprocess.Popen(
            [str(MINT022.python), str(LOOP)],
            env={**os.environ, **env, "STOPS_DIR": str(folder), "STOPS": ",".join(map(str, stops))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def is_over(self) -> bool:
        """Whether the client has ended."""
        return self._process.poll() is not None

    def meet(self, step: int) -> Callable[[], None]:
        """Wait until the loop is at a stop; returns what makes it go on."""
        at, go = (self._folder / f"{word}-{step}" for word in ("at", "go"))
        wait_for(lambda: at.exists() or self.is_over, 240)
        return go.touch

    def lasts(self, seconds: float) -> None:
        """Let time pass, during which the client must not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            _, err = self._process.communicate()
            raise AssertionError(f"the client ended with {self._process.returncode}: {err[-3000:]}")

    def outcome(self) -> Outcome:
        """Wait for the client's end, which must be a good one."""
        try:
            out, err = self._process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        assert self._process.returncode == 0, err[-3000:] + self._product.describe()[-6000:]
        said = json.loads(out)
        return Outcome(
            losses=said["losses"],
            tokens=said["tokens"],
            digests=digests(self._product, said["path"]),
            run_id=re.sub(r"\w+://([^/]+)/.*", r"\1", said["path"]),
            longest_s=float((self._folder / "stall").read_text()),
        )


def disturbed(
    product: Instance, env: Mapping[str, str], folder: Path, strikes: Mapping[int, Strike]
) -> Outcome:
    """Run the loop and strike at the given steps."""
    loop = Loop(product, env, folder, stops=list(strikes))
    for step, strike in strikes.items():
        strike(loop.meet(step))
    return loop.outcome()


def exports(product: Instance) -> dict[str, str]:
    """Return the variables that `make up` tells people to paste, and what makes a client keep to itself."""
    found = dict(re.findall(r"((?:MINT|TINKER)_[A-Z_]+)=(\S+)", product.output))
    return {**found, "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}


def digests(product: Instance, path: str) -> dict[str, str]:
    """Return the SHA-256 of the files of a checkpoint with numbers in them."""
    run_id, name = re.fullmatch(r"\w+://([^/]+)/weights/(.+)", path).groups()  # type: ignore[union-attr]
    ((directory,),) = rows(
        product,
        "SELECT c.directory FROM runs_checkpoint c JOIN runs_trainingrun r ON r.id = c.run_id"
        " WHERE r.public_id = %s AND c.name = %s",
        run_id,
        name,
    )
    files = product.stored(directory)
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in files.items()
        if name.endswith(".safetensors")
    }


def rows(product: Instance, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """Return what the instance's database answers."""
    address = product.env.get("DATABASE_URL") or embedded.database_url(product.data_dir)
    with psycopg.connect(address, autocommit=True) as connection:
        return connection.execute(statement.encode(), values).fetchall()


def submitted_steps(product: Instance, run_id: str) -> int:
    """Return how many steps of a run without code are submitted; one that is paused submits no more."""
    of_run = (
        "SELECT next_step FROM runs_recipe JOIN runs_trainingrun run ON run.id = run_id WHERE public_id = %s"
    )
    ((num_steps,),) = rows(product, of_run, run_id)
    return int(num_steps)


# What keeps the programs running ------------------------------------------------------------------------------


def ask(product: Instance, method: str, *arguments: object) -> Any:
    """Call a method of the instance's supervisord."""
    control = embedded.socket_dir(product.data_dir) / "up.sock"
    with getRPCInterface({"SUPERVISOR_SERVER_URL": f"unix://{control}"}) as server:
        return getattr(server.supervisor, method)(*arguments)


def is_running(product: Instance, program: str) -> bool:
    """Say whether supervisord has a process for a program (group:name)."""
    return bool(ask(product, "getProcessInfo", program)["statename"] in ("STARTING", "RUNNING"))


def is_ready(product: Instance) -> bool:
    """Say whether web server, database, a worker and a base model are there."""
    try:
        return httpx.get(f"{product.address}/health/ready", timeout=60).status_code == HTTPStatus.OK
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def without(product: Instance, program: str, *, kill: signal.Signals) -> Iterator[None]:
    """Have a program (group:name) end by a signal, stay away, and come back."""
    pid = ask(product, "getProcessInfo", program)["pid"]
    ask(product, "stopProcess", program, False)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, kill)
    wait_for(lambda: ask(product, "getProcessInfo", program)["statename"] == "STOPPED", 100)
    try:
        yield
    finally:
        ask(product, "startProcess", program, False)


# What passes between client and server ------------------------------------------------------------------------


class HttpWatch:
    """Counts the requests and the answers by status that pass a proxy."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.statuses: Counter[int] = Counter()

    def __call__(self, is_clients: bool, data: bytes) -> None:
        """Look at a piece; heads begin pieces, since nothing here pipelines."""
        if is_clients:
            self.num_requests += bool(re.match(rb"(GET|POST|PUT|DELETE) \S+ HTTP/1\.1\r\n", data))
        elif head := re.match(rb"HTTP/1\.1 (\d{3}) ", data):
            self.statuses[int(head[1])] += 1


def to_port(port: int) -> Callable[[], socket.socket]:
    """Return what connects to a port of this machine."""
    return lambda: socket.create_connection(("127.0.0.1", port))


def to_socket(path: Path) -> Callable[[], socket.socket]:
    """Return what connects to a unix socket."""

    def connect() -> socket.socket:
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(path))
        return one

    return connect
