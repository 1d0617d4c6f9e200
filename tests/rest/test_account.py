"""The caller, their keys, and what the server has."""

from __future__ import annotations

import math

from runs.models import ApiKey, DatasetVersion, TrainingRun, User, Worker
from tests.pages import seed
from tests.rest.client import Rest


def test_usage_counts_what_is_stored(alice: Rest, run: TrainingRun, version: DatasetVersion) -> None:
    checkpoint = seed.add_checkpoint(run, "one")
    assert alice.get("me/usage") == {
        "checkpoint_bytes": checkpoint.size_bytes,
        "num_checkpoints": 1,
        "dataset_bytes": version.size_bytes,
        "num_datasets": 1,
        "num_runs": 1,
    }


def test_a_key_is_made_used_and_revoked(alice: Rest) -> None:
    made = alice.post("keys", {"name": "nightly"})
    assert made["secret"].startswith("tml-")
    assert made["secret_for_mint"] == "sk-mint-" + made["secret"].removeprefix("tml-")
    assert made["secret"].removeprefix("tml-").startswith(made["prefix"])
    assert alice.get("me", x_api_key=made["secret"])["username"] == "alice"
    newest, first = alice.get("keys")["items"]
    assert (newest["id"], newest["name"], newest["revoked_at"]) == (made["id"], "nightly", None)
    assert newest["last_used_at"] is not None
    assert "secret" not in newest
    alice.done("DELETE", f"keys/{made['id']}", status=204)
    alice.refused("GET", "me", status=401, x_api_key=made["secret"])
    assert alice.get("keys")["items"][0]["revoked_at"] is not None
    alice.refused("DELETE", f"keys/{made['id']}", status=404)
    alice.done("DELETE", f"keys/{first['id']}", status=204)  # its own
    alice.refused("GET", "me", status=401)


def test_a_key_needs_a_name(alice: Rest) -> None:
    for name in ("", "x" * 101, "a\nb", 5):
        assert alice.refused("POST", "keys", {"name": name})["place"] == "name"
    assert ApiKey.objects.count() == 1


def test_a_secret_is_not_kept_for_a_replay(alice: Rest) -> None:
    error = alice.refused("POST", "keys", {"name": "a"}, idempotency_key="k")
    assert error["place"] == "Idempotency-Key"
    assert ApiKey.objects.count() == 1


def test_workers_are_listed_the_living_first(alice: Rest, run: TrainingRun) -> None:
    seed.make_worker(is_alive=False)
    alive = seed.make_worker()
    TrainingRun.objects.filter(pk=run.pk).update(worker=alive)
    first, second = alice.get("workers")["items"]
    assert (first["is_alive"], first["num_runs"], first["device"], first["busy_share"]) == (
        True,
        1,
        "cuda:0",
        0.83,
    )
    assert (second["is_alive"], second["busy_share"]) == (False, None)
    Worker.objects.update(busy_share=math.nan)
    assert alice.get("workers")["items"][0]["busy_share"] is None


def test_a_living_worker_says_who_draws_its_samples(alice: Rest) -> None:
    words = {"mintweb/tiny": "vLLM at http://127.0.0.1:8001 draws the samples"}
    for is_alive in (True, False):
        worker = seed.make_worker(is_alive=is_alive)
        Worker.objects.filter(pk=worker.pk).update(samplers=words)
    seed.make_worker()
    assert [one["samplers"] for one in alice.get("workers")["items"]] == [{}, words, {}]


def test_an_operator_drains_a_worker_and_resumes_it(alice: Rest, run: TrainingRun) -> None:
    worker = seed.make_worker()
    TrainingRun.objects.filter(pk=run.pk).update(worker=worker)
    assert alice.refused("POST", f"workers/{worker.pk}/drain", status=403)["code"] == "operators_only"
    User.objects.filter(pk=alice.user.pk).update(is_staff=True)
    for _ in range(2):  # asking again changes nothing
        drained = alice.post(f"workers/{worker.pk}/drain", status=200)
        assert (drained["state"], drained["num_runs"], drained["is_alive"]) == ("draining", 1, True)
    asked_at = drained["drain_asked_at"]
    TrainingRun.objects.filter(pk=run.pk).update(worker=None)
    (listed,) = alice.get("workers")["items"]
    assert (listed["state"], listed["drain_asked_at"]) == ("drained", asked_at)
    resumed = alice.post(f"workers/{worker.pk}/resume", status=200)
    assert (resumed["state"], resumed["drain_asked_at"]) == ("alive", None)


def test_only_a_worker_that_is_there_and_has_not_ended_is_drained(alice: Rest) -> None:
    User.objects.filter(pk=alice.user.pk).update(is_staff=True)
    ended = seed.make_worker(is_alive=False)
    for verb in ("drain", "resume"):
        message = alice.refused("POST", f"workers/{ended.pk}/{verb}")["message"]
        assert message == f"worker {ended.pk} has ended; only one that is alive is drained or resumed"
        alice.refused("POST", f"workers/{ended.pk + 1}/{verb}", status=404)
        alice.refused("POST", f"workers/{2**62 + 1}/{verb}")
    ended.refresh_from_db()
    assert ended.drain_asked_at is None


def test_base_models_are_listed(alice: Rest) -> None:
    (model,) = alice.get("base-models")["items"]
    assert (model["name"], model["is_loaded"], model["vocab_size"]) == ("mintweb/tiny", False, None)
