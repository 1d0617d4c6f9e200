"""A network between the programs and their databases that swallows, cuts and delays; the client only waits."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mintweb import embedded
from tests.e2e.disturbed import Loop, Outcome, ask, disturbed, exports, is_ready, rows, to_socket
from tests.e2e.proxy import Proxy
from tests.up.instances import ROOT, Instance, is_quiet, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)
GPU = "services:gpu"
LEASE_S, LOOK_S, RETURN_S, FROZEN_AFTER_S, HUNG_S = 15, 2, 6, 30, 30
QUIET_MACHINE_S, BUSY_MACHINE_S = 15, 60
NUM_STEPS = 25


@pytest.fixture
def proxies(product: Instance) -> Iterator[tuple[Proxy, Proxy]]:
    """What stands before the instance's PostgreSQL and Redis."""
    folder = embedded.socket_dir(product.data_dir)
    with (
        Proxy(to_socket(folder / ".s.PGSQL.5432")) as postgres,
        Proxy(to_socket(folder / "redis.sock")) as other,
    ):
        yield postgres, other


@contextlib.contextmanager
def far_worker(product: Instance, postgres: Proxy, redis: Proxy) -> Iterator[subprocess.Popen[bytes]]:
    """A GPU worker that reaches both databases through proxies."""
    options = (
        "--pool=solo",
        "--concurrency=1",
        "--queues=gpu",
        "--hostname=far@%h",
        "--include=gpuworker.tasks",
    )
    env = {
        **product.env,
        "DATABASE_URL": f"postgresql://mintweb@127.0.0.1:{postgres.port}/mintweb",
        "REDIS_URL": f"redis://127.0.0.1:{redis.port}/0",
        "OMP_NUM_THREADS": "1",
    }
    with (product.data_dir / "logs" / "far.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "--app", "mintweb", "--skip-checks", "worker", *options],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def live_pids(product: Instance) -> set[int]:
    """Return the processes of the workers that have loaded their models and are not declared dead."""
    found = rows(product, "SELECT pid FROM runs_worker WHERE stopped_at IS NULL AND dtype <> 'auto'")
    return {pid for (pid,) in found}


def holder_of_the_latest_run(product: Instance) -> int | None:
    found = rows(
        product,
        "SELECT w.pid FROM runs_trainingrun r LEFT JOIN runs_worker w ON w.id = r.worker_id"
        " ORDER BY r.id DESC LIMIT 1",
    )
    return None if not found else found[0][0]


def test_a_worker_cut_off_from_its_databases_loses_its_run_to_another(
    product: Instance, sdk_env: dict[str, str], proxies: tuple[Proxy, Proxy], tmp_path: Path
) -> None:
    undisturbed = disturbed(product, sdk_env, tmp_path / "undisturbed", {})
    postgres, redis = proxies
    ask(product, "stopProcess", GPU)
    with far_worker(product, postgres, redis) as far:
        wait_for(lambda: live_pids(product) == {far.pid}, 120, product.describe)
        loop = Loop(product, sdk_env, tmp_path / "loop", stops=[4, 8])
        go_on = loop.meet(4)
        assert holder_of_the_latest_run(product) == far.pid
        ask(product, "startProcess", GPU, False)
        wait_for(lambda: len(live_pids(product)) == 2, 120, product.describe)
        go_on()
        go_on = loop.meet(8)
        with postgres.swallowing(), redis.swallowing():
            cut_at = time.monotonic()
            go_on()
            open_ones = (
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
            )
            is_inside = rows(product, open_ones)[0][0] > 0
            longest_s = LEASE_S + LOOK_S + (FROZEN_AFTER_S if is_inside else 0)
            longest_s += QUIET_MACHINE_S if is_quiet() else BUSY_MACHINE_S
            wait_for(lambda: holder_of_the_latest_run(product) not in (far.pid, None), longest_s)
            moved_s = time.monotonic() - cut_at
            outcome = loop.outcome()
        healed_at = time.monotonic()
        # It ended because no renewal came through, or ends now that it hears that it was declared dead.
        assert far.wait(HUNG_S + BUSY_MACHINE_S) == 3
        ended_s = time.monotonic() - healed_at
    logger.info("the run moved after %.1f s, the worker ended %.1f s after the healing", moved_s, ended_s)
    assert outcome == undisturbed
    assert_nothing_is_doubled(product, outcome)


def test_a_worker_that_is_cut_off_for_long_ends_by_itself(
    product: Instance, proxies: tuple[Proxy, Proxy]
) -> None:
    postgres, redis = proxies
    with far_worker(product, postgres, redis) as far:
        wait_for(lambda: far.pid in live_pids(product), 120, product.describe)
        with postgres.swallowing():
            assert far.wait(HUNG_S + BUSY_MACHINE_S) == 3
    log = (product.data_dir / "logs" / "far.log").read_text()
    assert "the database took no renewal of the lease" in log


def test_connections_that_are_cut_are_made_anew(
    product: Instance, sdk_env: dict[str, str], proxies: tuple[Proxy, Proxy], tmp_path: Path
) -> None:
    undisturbed = disturbed(product, sdk_env, tmp_path / "undisturbed", {})
    postgres, redis = proxies
    ask(product, "stopProcess", GPU)
    try:
        with far_worker(product, postgres, redis) as far:
            wait_for(lambda: live_pids(product) == {far.pid}, 120, product.describe)

            def strike(go_on: object) -> None:
                postgres.cut()
                redis.cut()
                assert callable(go_on)
                go_on()

            outcome = disturbed(product, sdk_env, tmp_path / "loop", {4: strike, 8: strike, 16: strike})
            assert far.poll() is None
            assert live_pids(product) == {far.pid}
    finally:
        ask(product, "startProcess", GPU)
    assert outcome == undisturbed
    assert_nothing_is_doubled(product, outcome)


@pytest.mark.parametrize("what", ["server", "sessions"])
def test_workers_survive_a_crash_of_postgres(
    what: str, product: Instance, proxies: tuple[Proxy, Proxy]
) -> None:
    """It frees all their locks, and none of them finds another dead for that."""
    with far_worker(product, *proxies) as far:
        wait_for(lambda: far.pid in live_pids(product) and len(live_pids(product)) == 2, 120)
        before = live_pids(product)
        (server,) = product.processes("postgres")
        parts = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        os.kill(server if what == "server" else int(parts[0]), signal.SIGKILL)
        time.sleep(1)
        wait_for(lambda: is_ready(product), BUSY_MACHINE_S, product.describe)
        time.sleep(2 * RETURN_S)
        assert live_pids(product) == before, product.describe()
        assert far.poll() is None


def assert_nothing_is_doubled(product: Instance, outcome: Outcome) -> None:
    """Compare what the run's rows say with what its client did."""
    of_run = "(SELECT id FROM runs_trainingrun WHERE public_id = %s)"
    losses = (
        f"SELECT count(*), count(DISTINCT step) FROM runs_metric WHERE name = 'loss' AND run_id = {of_run}"
    )
    assert rows(product, losses, outcome.run_id) == [(NUM_STEPS, NUM_STEPS)]
    diverged = f"SELECT count(*) FROM runs_runevent WHERE kind = 'diverged' AND run_id = {of_run}"
    assert rows(product, diverged, outcome.run_id) == [(0,)]


# Every program behind a bad network ---------------------------------------------------------------------------


@pytest.fixture
def behind_proxies(tmp_path: Path) -> Iterator[tuple[Instance, Proxy, Proxy]]:
    """An instance whose databases are elsewhere, and the network between."""
    servers = tmp_path / "servers"
    with contextlib.ExitStack() as stack:
        stack.enter_context(embedded.running(servers))
        folder = embedded.socket_dir(servers)
        postgres = stack.enter_context(Proxy(to_socket(folder / ".s.PGSQL.5432")))
        redis = stack.enter_context(Proxy(to_socket(folder / "redis.sock")))
        instance = Instance(
            tmp_path / "data",
            DATABASE_URL=f"postgresql://mintweb@127.0.0.1:{postgres.port}/mintweb",
            REDIS_URL=f"redis://127.0.0.1:{redis.port}/0",
        )
        instance.start()
        try:
            yield instance, postgres, redis
        finally:
            for proxy in (postgres, redis):
                proxy.delay_s = proxy.cut_share = 0.0
            instance.stop(signal.SIGTERM)


def test_a_slow_network_that_cuts_connections_is_only_slow(
    behind_proxies: tuple[Instance, Proxy, Proxy], tmp_path: Path
) -> None:
    instance, *network = behind_proxies
    env = exports(instance)
    undisturbed = disturbed(instance, env, tmp_path / "undisturbed", {})
    for proxy in network:
        proxy.delay_s, proxy.cut_share = 0.1, 0.01
    loop = Loop(instance, env, tmp_path / "loop", stops=[])
    wait_for(lambda: loop.is_over, 400, instance.describe)
    for proxy in network:
        proxy.delay_s = proxy.cut_share = 0.0
    outcome = loop.outcome()
    cuts = [proxy.num_cut for proxy in network]
    logger.info("200 ms there and back, %s connections cut: longest wait %.1f s", cuts, outcome.longest_s)
    assert outcome == undisturbed
    assert_nothing_is_doubled(instance, outcome)
    assert cuts[0] > 0
