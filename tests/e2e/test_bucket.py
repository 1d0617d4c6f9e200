"""Files in an S3 bucket instead of a folder: everything is kept there, found there, and gone from there in the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from runs.services import storage_mark
from tests.e2e import bucket
from tests.e2e.bucket import Bucket
from tests.e2e.disturbed import Loop, Outcome, ask, disturbed, exports, rows, to_port
from tests.e2e.proxy import Proxy
from tests.e2e.test_rest import STEPS, TRAIN, check_adapter, run
from tests.up.instances import Instance, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

GPU = "services:gpu"
PREFIX = "of/mintweb"
# The worker's start, and what it takes to give a read up three times.
AWAY_S = 60 + 3 * 2 * 10 + 30
LARGE = 400 * 1024


@pytest.fixture(scope="module")
def store() -> Iterator[Bucket]:
    opened = Bucket()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def way(store: Bucket) -> Iterator[Proxy]:
    with Proxy(to_port(store.port)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def instance(store: Bucket, way: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    url = bucket.address(way.port, prefix=PREFIX)
    made = Instance(tmp_path_factory.mktemp("bucket") / "data", MINTWEB_STORAGE_URL=url, **bucket.KEYS)
    made.stored = lambda folder: {  # type: ignore[method-assign]
        name.rpartition("/")[2]: store.read(name) for name in store.names(f"{PREFIX}/{folder}/")
    }
    made.start()
    yield made
    assert made.stop() == 0


@pytest.fixture
def rest(instance: Instance) -> Iterator[httpx.Client]:
    headers = {"X-API-Key": exports(instance)["TINKER_API_KEY"]}
    with httpx.Client(
        base_url=f"{instance.address}/rest/v1/", headers=headers, trust_env=False, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(
    product: Instance, sdk_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What the loop is answered where files lie in a folder."""
    return disturbed(product, sdk_env, tmp_path_factory.mktemp("undisturbed") / "loop", {})


def test_a_worker_finds_the_runs_of_another_in_the_bucket(
    instance: Instance, store: Bucket, undisturbed: Outcome, tmp_path: Path
) -> None:
    def kill(go_on: Callable[[], None]) -> None:
        for pid in instance.processes("queues=gpu"):
            os.kill(pid, signal.SIGKILL)
        go_on()

    def restart(go_on: Callable[[], None]) -> None:
        ask(instance, "stopProcess", GPU)
        assert store.names(f"{PREFIX}/snapshots/")
        ask(instance, "startProcess", GPU, False)
        go_on()

    assert disturbed(instance, exports(instance), tmp_path / "loop", {8: kill, 16: restart}) == undisturbed
    assert not list((instance.data_dir / "storage").rglob("*"))


def test_a_bucket_that_is_away_is_waited_for(
    instance: Instance, way: Proxy, undisturbed: Outcome, tmp_path: Path
) -> None:
    loop = Loop(instance, exports(instance), tmp_path / "loop", stops=[8])
    go_on = loop.meet(8)
    ask(instance, "stopProcess", GPU)
    with way.swallowing():
        ask(instance, "startProcess", GPU, False)
        go_on()
        held_up = "SELECT held_up FROM runs_trainingrun ORDER BY id DESC LIMIT 1"
        wait_for(lambda: "nothing is lost" in rows(instance, held_up)[0][0], AWAY_S, instance.describe)
    assert loop.outcome() == undisturbed


def test_from_a_dataset_to_an_adapter_and_nothing_is_left(
    instance: Instance, store: Bucket, rest: httpx.Client, tmp_path: Path
) -> None:
    env = {"MINTWEB_URL": instance.address, "MINTWEB_API_KEY": exports(instance)["TINKER_API_KEY"]}
    done = run(TRAIN, "--steps", str(STEPS), "--rank", "4", "--out", str(tmp_path / "adapter"), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    check_adapter(tmp_path / "adapter", rank=4)

    text = "A long line. " * (LARGE // 13)
    posted = rest.post("datasets?filename=long.jsonl", content=f'{{"text": "{text}"}}\n'.encode())
    assert posted.status_code == 201, posted.text

    for kind in ("runs", "datasets"):
        assert store.names(f"{PREFIX}/datasets/")
        for row in rest.get(kind).json()["items"]:
            assert rest.delete(f"{kind}/{row['id']}").status_code == 204
    wait_for(lambda: set(kinds_of(store)) <= {"payloads", storage_mark.NAME}, 60, lambda: str(store.names()))


def kinds_of(store: Bucket) -> list[str]:
    return [name.removeprefix(f"{PREFIX}/").partition("/")[0] for name in store.names()]
