"""No room on the disk under an unmodified client: what must be stored waits or fails alone, all else goes on.

A limit on the size of a process's files stands for a full disk: it needs no rights, can be set on a running
process, and leaves files torn at the same place. Where tests may mount, a small file system is really full.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MINT022
from tests.e2e.disturbed import rows
from tests.up.instances import Instance, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

LOOP = Path(__file__).with_name("full_disk_loop.py")
NO_ROOM_BYTES = 64 * 1024
MOUNTED_BYTES = 128 * 1024
PATIENCE_S = 90


@contextlib.contextmanager
def small_files(pids: list[int]) -> Iterator[None]:
    """Let some processes write no file longer than 64 KiB."""
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (NO_ROOM_BYTES, hard))
    try:
        yield
    finally:
        for pid, limit in limits.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Put a file system over a folder that has room for a few small files only."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MOUNTED_BYTES}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("this process may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


Full = Callable[[Instance, str, str], contextlib.AbstractContextManager[None]]


@pytest.fixture(params=["limit", "mount"])
def full(request: pytest.FixtureRequest) -> Full:
    """Make a folder of the storage full for a program, while a `with` lasts."""
    if request.param == "limit":
        return lambda product, program, folder: small_files(product.processes(program))
    return lambda product, program, folder: small_disk(product.data_dir / "storage" / folder)


class Client:
    """A client process that does one thing at a time."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(MINT022.python), str(LOOP)],
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log = log

    def begin(self, order: str) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """Wait for what came of it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._log.read_text()[-3000:]
        return line.strip()

    def does(self, order: str) -> str:
        """Have it do something and wait for what came of it."""
        self.begin(order)
        return self.answer()

    def end(self) -> None:
        """Close its input, which ends it."""
        self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0, self._log.read_text()[-3000:]


@pytest.fixture
def client(sdk_env: dict[str, str], tmp_path: Path) -> Iterator[Client]:
    client = Client(sdk_env, tmp_path / "client.log")
    yield client
    client.end()


def files_in(product: Instance, folder: str) -> set[Path]:
    return {path for path in (product.data_dir / "storage" / folder).rglob("*") if path.is_file()}


def log_of(product: Instance, program: str) -> str:
    return (product.data_dir / "logs" / f"{program}.log").read_text()


def told(product: Instance) -> str:
    """Return why the client's run is held up, as its page says."""
    (reason,) = rows(product, "SELECT held_up FROM runs_trainingrun ORDER BY id DESC LIMIT 1")[0]
    return str(reason)


def test_a_large_payload_waits_for_room(client: Client, product: Instance, full: Full) -> None:
    expected = client.does("large 1")
    had = files_in(product, "payloads")
    num_refused = log_of(product, "web").count("disk is full")
    (num_before,) = rows(product, "SELECT count(*) FROM runs_operation")[0]
    with full(product, "uvicorn", "payloads"):
        client.begin("large 2")
        wait_for(lambda: log_of(product, "web").count("disk is full") > num_refused, PATIENCE_S)
        # Nothing half-written is left; the client goes on trying, which writes something for a moment.
        wait_for(lambda: not (files_in(product, "payloads") - had), PATIENCE_S)
        assert rows(product, "SELECT count(*) FROM runs_operation")[0] == (num_before,)
        wait_for(lambda: "the server's disk is full" in told(product), PATIENCE_S)
    assert client.answer() != expected  # taken in the end, and the weights have moved since
    assert told(product) == ""
    assert client.does("small") != "failed"


def test_a_save_without_room_fails_alone(client: Client, product: Instance, full: Full) -> None:
    client.does("small")
    with full(product, "queues=gpu", "checkpoints"):
        had = files_in(product, "checkpoints")
        answer = client.does("save first")
        assert answer.startswith("failed RequestFailedError")
        assert "the checkpoint cannot be written" in answer
        assert "server" in answer
        assert not client.does("small").startswith("failed")
        assert files_in(product, "checkpoints") == had
    assert client.does("save first") == "saved"
    assert client.does("load first") == "loaded"


def test_a_snapshot_without_room_is_tried_again(client: Client, product: Instance, full: Full) -> None:
    assert client.does("save second") == "saved"
    had = files_in(product, "snapshots")
    num_failed = log_of(product, "gpu").count("could not be committed")
    with full(product, "queues=gpu", "snapshots"):
        assert client.does("load second") == "loaded"  # asks for a snapshot
        assert not client.does("small").startswith("failed")
        wait_for(lambda: log_of(product, "gpu").count("could not be committed") > num_failed, PATIENCE_S)
        assert not (files_in(product, "snapshots") - had)
    assert client.does("load second") == "loaded"
    wait_for(lambda: files_in(product, "snapshots") - had, PATIENCE_S)
    assert not client.does("small").startswith("failed")
