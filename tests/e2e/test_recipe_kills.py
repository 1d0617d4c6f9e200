"""The processes behind a run without code die again and again: the adapter is that of the undisturbed run."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import tarfile
from collections.abc import Iterator
from typing import Any, Final

import httpx
import psycopg
import pytest

from mintweb import embedded
from tests.e2e.conftest import ROOT
from tests.up.instances import Instance, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
NUM_KILLS: Final = 20
NUM_STEPS: Final = 20 * NUM_KILLS
DATA = ROOT / "examples" / "data" / "pirate_qa.jsonl"
# What is killed together, by a part of the command line.
TARGETS: Final = (("queues=recipes",), ("uvicorn",), ("queues=recipes", "uvicorn"))


@pytest.fixture
def http(product: Instance, sdk_env: dict[str, str]) -> Iterator[httpx.Client]:
    """Return a client of the REST API."""
    headers = {"X-API-Key": sdk_env["TINKER_API_KEY"]}
    # The web server that answers the next request may be another than the one that answered the last.
    limits = httpx.Limits(max_keepalive_connections=0)
    url = f"{product.address}/rest/v1"
    with httpx.Client(base_url=url, headers=headers, timeout=60, limits=limits) as client:
        yield client


def test_twenty_kills_of_recipes_and_web_change_no_byte(product: Instance, http: httpx.Client) -> None:
    dataset = upload(http)
    undisturbed = start(http, dataset)
    wait_for(lambda: recipe_state(product, undisturbed) == "finished", 300, product.describe)

    disturbed = start(http, dataset)
    rng = random.Random(7)
    for number in range(NUM_KILLS):
        reached = (number + 1) * NUM_STEPS // (NUM_KILLS + 12)  # long before it ends by itself
        wait_for(lambda reached=reached: num_steps_done(product, disturbed) >= reached, 180, product.describe)  # type: ignore[misc]
        assert recipe_state(product, disturbed) == "running"
        kill(product, rng.choice(TARGETS))
    wait_for(lambda: recipe_state(product, disturbed) == "finished", 300, product.describe)

    assert operations(product, disturbed) == operations(product, undisturbed)
    assert adapter(http, disturbed) == adapter(http, undisturbed)


def upload(http: httpx.Client) -> str:
    reply = http.post("/datasets", files={"file": (DATA.name, DATA.read_bytes())})
    assert reply.status_code == 201, reply.text
    dataset = str(reply.json()["id"])
    wait_for(lambda: http.get(f"/datasets/{dataset}").json()["newest"]["state"] == "ready", 120)
    return dataset


def start(http: httpx.Client, dataset: str) -> str:
    settings: dict[str, Any] = {
        "base_model": "mintweb/tiny",
        "dataset": dataset,
        "num_steps": NUM_STEPS,
        "batch_size": 8,
        "eval_every": 20,
        "save_every": 25,
        "samples": {"prompts": ["What does a dog say?"], "every": 30, "max_tokens": 8},
    }
    reply = http.post("/runs", json=settings)
    assert reply.status_code == 201, reply.text
    return str(reply.json()["id"])


def kill(product: Instance, parts: tuple[str, ...]) -> None:
    """Kill the processes and wait for their successors; the run goes on meanwhile."""
    for part in parts:
        old = product.processes(part)
        for pid in old:
            os.kill(pid, signal.SIGKILL)
    for part in parts:
        wait_for(lambda part=part, old=old: set(product.processes(part)) - set(old), 120, product.describe)  # type: ignore[misc]


def adapter(http: httpx.Client, run_id: str) -> str:
    """Return the digest of the final adapter's tensors, as anybody downloads it."""
    wait_for(lambda: answers(http), 120)
    reply = http.get(f"/runs/{run_id}/checkpoints/weights/final/download")
    assert reply.is_success, reply.text
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as archive:
        (name,) = [one for one in archive.getnames() if one.endswith("adapter_model.safetensors")]
        file = archive.extractfile(name)
        assert file is not None
        return hashlib.sha256(file.read()).hexdigest()


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/me").is_success
    except httpx.TransportError:
        return False


def operations(product: Instance, run_id: str) -> tuple[list[tuple[Any, ...]], int]:
    """Return what the worker did in order, and how many results were entered, which is whenever they are seen."""
    rows = query(
        product,
        """SELECT op.kind, op.state FROM runs_operation op JOIN runs_trainingrun run ON run.id = op.run_id
           WHERE run.public_id = %s ORDER BY op.seq""",
        run_id,
    )
    done = [row for row in rows if row[0] != "record_metrics"]
    return done, len(rows) - len(done)


def num_steps_done(product: Instance, run_id: str) -> int:
    ((step,),) = query(product, "SELECT step FROM runs_trainingrun WHERE public_id = %s", run_id)
    return int(step)


def recipe_state(product: Instance, run_id: str) -> str:
    ((state, error),) = query(
        product,
        """SELECT recipe.state, recipe.error FROM runs_recipe recipe JOIN runs_trainingrun run ON run.id = recipe.run_id
           WHERE run.public_id = %s""",
        run_id,
    )
    assert state != "failed", error
    return str(state)


def query(product: Instance, sql: str, run_id: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(embedded.database_url(product.data_dir)) as connection:
        return connection.execute(sql.encode(), [run_id]).fetchall()
