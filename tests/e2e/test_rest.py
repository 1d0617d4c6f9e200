"""The examples for the REST API against the running product: from a file to an adapter that PEFT can read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open

from tests.e2e.conftest import ROOT
from tests.e2e.disturbed import submitted_steps
from tests.rest.receiver import receiving
from tests.up.instances import Instance, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TRAIN = [sys.executable, str(ROOT / "examples" / "rest_train.py")]
QUICKSTART = ["sh", str(ROOT / "examples" / "rest_quickstart.sh")]
STEPS = 12


@pytest.fixture
def rest_env(product: Instance, sdk_env: dict[str, str]) -> dict[str, str]:
    """Return what a script needs to know."""
    return {"MINTWEB_URL": product.address, "MINTWEB_API_KEY": sdk_env["TINKER_API_KEY"]}


def run(command: list[str], *args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run an example to its end."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("MINTWEB_")}
    return subprocess.run(
        [*command, *args], env={**clean, **env}, capture_output=True, text=True, timeout=280, check=False
    )


def check_adapter(folder: Path, *, rank: int) -> None:
    """Check that a folder holds an adapter whose weights have moved."""
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", rank)
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert ups
    assert all(rank in tensor.shape for tensor in ups)
    assert any(abs(tensor).max() > 0 for tensor in ups)  # they start at zero


def test_the_python_example_trains_and_downloads(rest_env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    done = run(
        TRAIN,
        "--steps",
        str(STEPS),
        "--rank",
        "4",
        "--out",
        str(folder),
        "--name",
        "from python",
        env=rest_env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = re.findall(r"^step +(\d+)  loss ([\d.]+)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in losses] == list(range(1, STEPS + 1))
    assert "200 rows of the kind chat" in done.stdout
    check_adapter(folder, rank=4)


def test_the_curl_example_trains_and_downloads(rest_env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    file = tmp_path / "my rows.jsonl"
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"{n + 1}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(QUICKSTART, str(file), str(folder), env={**rest_env, "MINTWEB_STEPS": str(STEPS)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 rows of the kind completion" in done.stdout
    assert re.search(r"finished, loss [\d.]+", done.stdout)
    check_adapter(folder, rank=16)


@pytest.mark.parametrize("command", [TRAIN, QUICKSTART], ids=["python", "curl"])
def test_the_examples_say_what_is_wrong(command: list[str], rest_env: dict[str, str], tmp_path: Path) -> None:
    helped = run(command, "--help", env={})
    assert (helped.returncode, "usage" in helped.stdout) == (0, True)
    assert "MINTWEB_API_KEY" in helped.stdout
    keyless = run(command, env={"MINTWEB_URL": rest_env["MINTWEB_URL"]})
    assert keyless.returncode != 0
    assert "set MINTWEB_API_KEY" in keyless.stderr
    wrong = run(command, env={**rest_env, "MINTWEB_API_KEY": "tml-wrong"})
    assert wrong.returncode == 1
    assert "401" in wrong.stderr
    assert "unknown or was revoked" in wrong.stderr
    missing = run(command, str(tmp_path / "none.jsonl"), env=rest_env)
    assert missing.returncode == 1
    assert "none.jsonl" in missing.stderr
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{"b": \n')
    refused = run(command, str(bad), env=rest_env)
    assert refused.returncode == 1
    assert "needs" in refused.stderr or "failed" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_file_larger_than_other_bodies_comes_from_who_has_a_key(rest_env: dict[str, str]) -> None:
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    content = line * (65 * 1024**2 // len(line))
    with httpx.Client(base_url=f"{rest_env['MINTWEB_URL']}/rest/v1/", trust_env=False, timeout=60) as client:
        try:
            refused = client.post("datasets", content=content)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "not_authenticated"
        except httpx.WriteError:
            pass  # the server has closed the connection while the rest was being sent
        client.headers["X-API-Key"] = rest_env["MINTWEB_API_KEY"]
        made = client.post("datasets?filename=large.jsonl", content=content)
        assert made.status_code == 201, made.text
        assert made.json()["version"]["size_bytes"] == len(content)
        assert client.post("webhooks", content=content).status_code == 413
        assert client.delete(f"datasets/{made.json()['id']}").status_code == 204


def test_a_webhook_is_told_of_a_run_within_seconds(rest_env: dict[str, str], tmp_path_factory: Any) -> None:
    settings = {"MINTWEB_WEBHOOK_HOSTS": "127.0.0.1"}
    instance = Instance(tmp_path_factory.mktemp("webhooks") / "data", **settings)
    instance.start()
    try:
        found = re.search(r"TINKER_API_KEY=(\S+)", instance.output)
        assert found is not None
        with (
            receiving() as receiver,
            httpx.Client(
                base_url=f"{instance.address}/rest/v1/",
                headers={"X-API-Key": found[1]},
                trust_env=False,
                timeout=60,
            ) as client,
        ):
            body = {
                "url": receiver.url,
                "events": ["run.finished", "metric.threshold"],
                "threshold": {"metric": "loss", "above": 0},
            }
            made = client.post("webhooks", json=body).json()
            receiver.statuses = [500]
            env = {"MINTWEB_URL": instance.address, "MINTWEB_API_KEY": found[1]}
            folder = tmp_path_factory.mktemp("adapter")
            done = run(TRAIN, "--steps", "3", "--out", str(folder), env=env)
            assert done.returncode == 0, done.stdout + done.stderr
            wait_for(lambda: len(receiver.told) >= 3, 120)
            events = [told.content["event"] for told in receiver.told]
            assert sorted(set(events)) == ["metric.threshold", "run.finished"]
            assert len(events) == 3  # one of them was told again after its 500
            assert all(told.is_signed_with(made["secret"]) for told in receiver.told)
    finally:
        assert instance.stop() == 0


def test_the_journey_by_rest(product: Instance, rest_env: dict[str, str], tmp_path: Path) -> None:
    """A file with a bad row, a run that is paused and changed, a fork of it, and the fork's adapter."""
    good = (ROOT / "examples" / "data" / "pirate_qa.jsonl").read_bytes()
    headers = {"X-API-Key": rest_env["MINTWEB_API_KEY"]}
    with httpx.Client(base_url=f"{rest_env['MINTWEB_URL']}/rest/v1", headers=headers, timeout=60) as client:

        def call(method: str, path: str, **arguments: Any) -> Any:
            reply = client.request(method, path, **arguments)
            assert reply.is_success, reply.text
            return reply.json()

        def wait(path: str, **wanted: Any) -> None:
            wait_for(lambda: wanted.items() <= call("GET", path).items(), 120, lambda: str(call("GET", path)))

        dataset = call("POST", "/datasets", files={"file": ("rows.jsonl", good + b'{"messages": []}\n')})[
            "id"
        ]
        version = f"/datasets/{dataset}/versions/1"
        wait(version, state="needs_choice", num_bad_rows=1)
        (problem,) = call("GET", f"{version}/report")["report"]["problems"]
        assert problem["line"] == 201
        call("POST", f"{version}/skip-bad-rows")
        wait(version, state="ready", num_rows=200)

        settings = {"base_model": "mintweb/tiny", "dataset": dataset, "num_steps": 2_000}
        run = call("POST", "/runs", json=settings)["id"]
        wait_for(lambda: call("GET", f"/runs/{run}")["step"] >= 3, 120)
        call("POST", f"/runs/{run}/pause")
        wait(f"/runs/{run}/status", state="paused")
        num_steps = submitted_steps(product, run) + 10
        call("POST", f"/runs/{run}/change", json={"learning_rate": 0.002, "num_steps": num_steps})
        call("POST", f"/runs/{run}/resume")
        wait(f"/runs/{run}/status", state="finished", step=num_steps)

        body = {"checkpoint": "final", "changes": {"num_steps": num_steps + 10}, "name": "forked"}
        fork = call("POST", f"/runs/{run}/fork", json=body)["id"]
        while not (status := call("GET", f"/runs/{fork}/status?wait_s=30"))["is_over"]:
            assert status["state"] not in ("paused", "stopping")  # held for as long as it trains
        assert (status["state"], status["step"]) == ("finished", num_steps + 10)
        kinds = {event["kind"] for event in call("GET", f"/runs/{run}/events")["items"]}
        assert {"paused", "changed", "resumed", "finished"} <= kinds
        (losses,) = call("GET", f"/runs/{fork}/metrics/series", params={"name": "loss"})["series"]
        ends = [losses["buckets"][0]["step"], losses["buckets"][-1]["last_step"]]
        assert ends == [num_steps + 1, num_steps + 10]
        archive = tmp_path / "final.tar"
        archive.write_bytes(client.get(f"/runs/{fork}/checkpoints/weights/final/download").content)
    with tarfile.open(archive) as content:
        content.extractall(tmp_path / "adapter", filter="data")
    (config,) = (tmp_path / "adapter").rglob("adapter_config.json")
    check_adapter(config.parent, rank=16)
