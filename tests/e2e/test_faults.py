"""Faults under an unmodified client: it is answered as in the undisturbed run, and nobody sees an exception.

`make faults-full` has the servers away for a minute instead of some seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from mintweb import embedded
from tests.e2e.disturbed import (
    HttpWatch,
    Loop,
    Outcome,
    Strike,
    ask,
    disturbed,
    is_ready,
    is_running,
    to_port,
    without,
)
from tests.e2e.proxy import Proxy
from tests.up.instances import Instance, is_quiet, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)
IS_FULL = os.environ.get("FAULTS") == "full"
AWAY_S = 60 if IS_FULL else 12
FLUSH_EVERY_S = 5 if IS_FULL else 0.5
NUM_ROUNDS = 4 if IS_FULL else 1
QUIET_STALL_S, BUSY_STALL_S = 10, 90
POSTGRES, REDIS = "databases:postgres", "databases:redis"
SERVICES = ("services:gpu", "services:web", "services:cpu", "services:recipes", "services:beat")


@pytest.fixture(scope="module")
def undisturbed(
    product: Instance, sdk_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What the loop is answered when nothing goes wrong."""
    return disturbed(product, sdk_env, tmp_path_factory.mktemp("undisturbed") / "loop", {})


@pytest.fixture
def loop_dir(tmp_path: Path) -> Path:
    return tmp_path / "loop"


# Deaths -------------------------------------------------------------------------------------------------------


def kill(product: Instance, *parts: str) -> None:
    """End every process of the instance whose command has one of the parts, without a word."""
    for part in parts:
        for pid in product.processes(part):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "parts",
    [
        ("queues=gpu",),
        ("uvicorn",),
        ("redis",),
        ("postgres",),
        ("queues=", "celery", "uvicorn", "redis", "postgres"),
    ],
    ids=["gpu", "web", "redis", "postgres", "everything"],
)
def test_a_client_only_waits(
    parts: tuple[str, ...],
    product: Instance,
    sdk_env: dict[str, str],
    undisturbed: Outcome,
    loop_dir: Path,
) -> None:
    def strike(go_on: Callable[[], None]) -> None:
        kill(product, *parts)
        go_on()

    assert disturbed(product, sdk_env, loop_dir, {8: strike, 16: strike}) == undisturbed


def test_everything_dies_with_its_supervisor_and_is_started_again(
    product: Instance, sdk_env: dict[str, str], undisturbed: Outcome, loop_dir: Path
) -> None:
    def strike(go_on: Callable[[], None]) -> None:
        assert product.process is not None
        product.process.kill()
        product.process.wait()
        go_on()
        wait_for(lambda: not product.processes("celery"), 60)
        product.start()

    assert disturbed(product, sdk_env, loop_dir, {8: strike}) == undisturbed


# Servers that stay away ---------------------------------------------------------------------------------------


@pytest.fixture
def watched(product: Instance, sdk_env: dict[str, str]) -> Iterator[tuple[dict[str, str], HttpWatch]]:
    """A client's variables that lead it through a proxy, and what that counts."""
    watch = HttpWatch()
    with Proxy(to_port(product.port), watch=watch) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        yield {**sdk_env, "MINT_BASE_URL": address, "TINKER_BASE_URL": address}, watch


def test_without_postgres_a_client_waits_and_does_not_spin(
    product: Instance,
    watched: tuple[dict[str, str], HttpWatch],
    undisturbed: Outcome,
    loop_dir: Path,
) -> None:
    env, watch = watched
    loop = Loop(product, env, loop_dir, stops=[8])
    go_on = loop.meet(8)
    with without(product, POSTGRES, kill=signal.SIGQUIT):
        num_before = watch.num_requests
        go_on()
        loop.lasts(AWAY_S)
        num_meanwhile = watch.num_requests - num_before
    back_at = time.monotonic()
    outcome = loop.outcome()
    late_s = time.monotonic() - back_at
    logger.info(
        "PostgreSQL away for %s s: %s requests meanwhile, done %.1f s after its return, statuses %s",
        *(AWAY_S, num_meanwhile, late_s, dict(watch.statuses)),
    )
    assert outcome == undisturbed
    # About two dozen answers are awaited, and each request is held for up to 25 s.
    assert num_meanwhile < 40 + 2 * AWAY_S
    assert not [status for status in watch.statuses if status >= 500]


def test_redis_is_not_needed(
    product: Instance, sdk_env: dict[str, str], undisturbed: Outcome, tmp_path: Path
) -> None:
    with without(product, REDIS, kill=signal.SIGKILL):
        begun_at = time.monotonic()
        for number in range(100):
            loop = Loop(product, sdk_env, tmp_path / f"loop{number}", stops=[])
            outcome = loop.outcome()
            assert outcome == undisturbed
            if time.monotonic() - begun_at > (AWAY_S if IS_FULL else 0):
                break
        assert not is_running(product, REDIS)
        logger.info("without Redis: %s loops, longest wait %.2f s", number + 1, outcome.longest_s)
    wait_for(lambda: is_running(product, REDIS), 60)


def test_redis_forgets_everything_again_and_again(
    product: Instance, sdk_env: dict[str, str], undisturbed: Outcome, tmp_path: Path
) -> None:
    over = threading.Event()
    num_flushed = 0

    def flush() -> None:
        nonlocal num_flushed
        with redis.Redis.from_url(embedded.redis_url(product.data_dir)) as client:
            while not over.wait(FLUSH_EVERY_S):
                client.flushall()
                num_flushed += 1

    flushing = threading.Thread(target=flush)
    flushing.start()
    begun_at = time.monotonic()
    try:
        for number in range(100):
            outcome = disturbed(product, sdk_env, tmp_path / f"loop{number}", {})
            assert outcome == undisturbed
            if time.monotonic() - begun_at > (AWAY_S if IS_FULL else 0):
                break
    finally:
        over.set()
        flushing.join()
    logger.info("%s times FLUSHALL, longest wait %.2f s", num_flushed, outcome.longest_s)
    assert num_flushed > 1


# Restarts -----------------------------------------------------------------------------------------------------


def test_a_rolling_restart_is_a_pause(
    product: Instance, sdk_env: dict[str, str], undisturbed: Outcome, tmp_path: Path
) -> None:
    programs = (*SERVICES, REDIS, POSTGRES)

    def restarts(program: str) -> Strike:
        def strike(go_on: Callable[[], None]) -> None:
            pid = ask(product, "getProcessInfo", program)["pid"]
            go_on()
            ask(product, "signalProcess", program, "INT" if program == POSTGRES else "TERM")
            wait_for(lambda: ask(product, "getProcessInfo", program)["pid"] not in (0, pid), 90)
            wait_for(lambda: is_ready(product), 120)

        return strike

    stalls = []
    for number in range(NUM_ROUNDS):
        strikes = {3 * (place + 1): restarts(program) for place, program in enumerate(programs)}
        outcome = disturbed(product, sdk_env, tmp_path / f"loop{number}", strikes)
        assert outcome == undisturbed
        stalls.append(round(outcome.longest_s, 1))
    logger.info("%s restarts, longest waits %s s", NUM_ROUNDS * len(programs), stalls)
    assert max(stalls) <= (QUIET_STALL_S if is_quiet() else BUSY_STALL_S)
