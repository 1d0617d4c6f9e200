"""Samples: asked for, waited for, refused where they cannot be."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.db.models.functions import Now
from tokenizers import Tokenizer

from runs.models import Operation, Session, TrainingRun
from runs.schemas import tinker_pb2 as pb
from runs.services import commits, expired_operations, expired_samples, operations
from runs.services.commits import Result
from tests.pages import seed
from tests.rest.client import Rest
from tests.rest.conftest import BASE_MODEL, TINY

tokenizer: Any = Tokenizer.from_file(str(TINY / "tokenizer.json"))


def answer(sample_id: str, *texts: str) -> None:
    """Answer a sample as a worker does."""
    response = pb.SampleResponse()
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        response.sequences.add(
            stop_reason=pb.STOP_REASON_LENGTH,
            tokens=b"".join(token.to_bytes(4, "little") for token in tokens),
            logprobs=b"".join(b"\0\0\0\0" for _ in tokens),
        )
    pk = int(sample_id.removeprefix("op-"))
    commits.commit_samples({pk: Result(body=response.SerializeToString(), is_proto=True)})


def payload_of(sample_id: str) -> dict[str, Any]:
    """Return what the worker is asked."""
    row = Operation.objects.get(pk=int(sample_id.removeprefix("op-")))
    assert row.payload is not None
    content: dict[str, Any] = json.loads(bytes(row.payload))
    return content


def test_a_base_model_answers(alice: Rest) -> None:
    body = {"prompt": "Who?", "base_model": BASE_MODEL, "max_tokens": 8, "seed": 3, "num_samples": 2}
    asked = alice.post("samples", body, status=202)
    assert (asked["state"], asked["sequences"], asked["checkpoint"]) == ("queued", [], None)
    assert "worker" in asked["reason"]
    params = payload_of(asked["id"])["sampling_params"]
    assert (params["max_tokens"], params["seed"]) == (8, 3)
    answer(asked["id"], "A fox.", "An owl.")
    done = alice.get(f"samples/{asked['id']}")
    assert (done["state"], done["reason"]) == ("done", "")
    assert [one["text"] for one in done["sequences"]] == ["A fox.", "An owl."]
    assert done["sequences"][0]["stop_reason"] == "length"


def test_a_prompt_goes_through_the_chat_template_unless_it_is_raw(alice: Rest) -> None:
    def prompt(**body: Any) -> str:
        asked = alice.post("samples", {"base_model": BASE_MODEL, **body}, status=202)
        tokens = payload_of(asked["id"])["prompt"]["chunks"][0]["tokens"]
        return str(tokenizer.decode(tokens, skip_special_tokens=False))

    chat = prompt(prompt="Who?")
    assert "Who?" in chat
    assert chat != "Who?"
    assert prompt(messages=[{"role": "user", "content": "Who?"}]) == chat
    assert prompt(prompt="Who?", raw=True) == "Who?"


def test_the_newest_checkpoint_of_a_run_answers(alice: Rest, run: TrainingRun) -> None:
    assert alice.refused("POST", "samples", {"prompt": "a", "run": run.public_id})["place"] == "run"
    seed.add_checkpoint(run, "one")
    asked = alice.post("samples", {"prompt": "a", "run": run.public_id}, status=202)
    assert asked["checkpoint"] == f"tinker://{run.public_id}/weights/one"
    again = alice.post("samples", {"prompt": "a", "checkpoint": asked["checkpoint"]}, status=202)
    assert again["checkpoint"] == asked["checkpoint"]


def test_nobody_samples_from_somebody_elses_weights(alice: Rest, bob: Rest, run: TrainingRun) -> None:
    checkpoint = seed.add_checkpoint(run, "one")
    path = f"tinker://{run.public_id}/weights/one"
    bob.refused("POST", "samples", {"prompt": "a", "run": run.public_id}, status=404)
    bob.refused("POST", "samples", {"prompt": "a", "checkpoint": path}, status=404)
    checkpoint.is_public = True
    checkpoint.save(update_fields=["is_public"])
    bob.post("samples", {"prompt": "a", "checkpoint": path}, status=202)


@pytest.mark.parametrize(
    ("body", "place", "message"),
    [
        ({}, "", "give prompt or messages"),
        ({"prompt": "a"}, "", "give one of checkpoint, run, base_model"),
        (
            {"prompt": "a", "base_model": BASE_MODEL, "run": "x"},
            "",
            "give one of checkpoint, run, base_model",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "base_model": BASE_MODEL, "raw": True},
            "",
            "prompt",
        ),
        ({"prompt": "a", "base_model": "gpt-5"}, "base_model", BASE_MODEL),
        ({"prompt": "", "base_model": BASE_MODEL, "raw": True}, "prompt", "no tokens"),
        ({"prompt": "a", "base_model": BASE_MODEL, "max_tokens": 0}, "max_tokens", "greater than"),
        ({"prompt": "a", "base_model": BASE_MODEL, "temperature": "hot"}, "temperature", "number"),
        ({"prompt": "a", "checkpoint": "one"}, "checkpoint", "tinker://"),
        (
            {"messages": [{"role": "pirate", "content": "a"}], "base_model": BASE_MODEL},
            "messages[0].role",
            "",
        ),
    ],
)
def test_a_request_that_cannot_be_is_named(alice: Rest, body: Any, place: str, message: str) -> None:
    error = alice.refused("POST", "samples", body)
    assert error["place"] == place
    assert message in error["message"]
    assert not Session.objects.exists()


def test_a_refusal_leaves_no_session(alice: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MAX_QUEUED_SAMPLES", 1)
    body = {"prompt": "a", "base_model": BASE_MODEL}
    alice.post("samples", body, status=202)
    assert alice.refused("POST", "samples", body, status=429)["code"] == "rate_limited"
    assert Session.objects.count() == 1


def test_a_failed_sample_says_why(alice: Rest) -> None:
    asked = alice.post("samples", {"prompt": "a", "base_model": BASE_MODEL}, status=202)
    pk = int(asked["id"].removeprefix("op-"))
    Operation.objects.filter(pk=pk).update(state=Operation.State.FAILED, error="out of memory")
    done = alice.get(f"samples/{asked['id']}?wait_s=5")
    assert (done["state"], done["error"]) == ("failed", "out of memory")


def test_an_operation_that_is_no_sample_is_none(alice: Rest, run: TrainingRun) -> None:
    step = Operation.objects.filter(run=run).first()
    assert step is not None
    alice.refused("GET", f"samples/{step.request_id}", status=404)
    for wrong in ("1", "op-0", "op-x", "op-99999999999999999999"):
        alice.refused("GET", f"samples/{wrong}", status=404)


def test_an_answer_that_was_deleted_is_told(alice: Rest) -> None:
    asked = alice.post("samples", {"prompt": "Who?", "base_model": BASE_MODEL}, status=202)
    answer(asked["id"], "A fox.")
    later = Now() - expired_operations.KEEP_RESULTS - timedelta(minutes=1)
    Operation.objects.filter(pk=int(asked["id"].removeprefix("op-"))).update(finished_at=later)
    expired_samples.forget()
    reply = alice.send("GET", f"samples/{asked['id']}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (410, "result_expired")
    Session.objects.filter(display_name="REST").update(finished_at=later)
    expired_samples.forget()
    assert alice.send("GET", f"samples/{asked['id']}").status_code == 404
    assert not Session.objects.filter(display_name="REST").exists()
