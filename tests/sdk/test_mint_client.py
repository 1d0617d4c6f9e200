"""The mint package against the stub server, over both tinker versions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.sdk.sdk_paths import ROOT, RunClient
from tests.sdk.stub_server import running
from tests.sdk.stub_state import State

CASES = Path(__file__).parent / "client_cases.py"
GOOD_LOGPROBS = [-2.0 - 0.2, -2.0 - 0.3, -2.0 - 0.4]
GOOD_LOSS = pytest.approx(-sum(GOOD_LOGPROBS) / 3, abs=1e-6)


def facts_of(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    assert "DEPRECATED" not in process.stderr
    facts: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return facts


def operations(state: State) -> list[tuple[int, str]]:
    """The numbered operations that reached the server, by number."""
    return sorted(
        (body["seq_id"], path) for path, body in state.log if "seq_id" in body and path != "asample"
    )


def test_it_runs_the_guide_as_printed(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer, hold_until=4) as (url, state):
        process = run_client(ROOT / "examples" / "async_patterns.py", url=url)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("Loss: 2.") for line in lines)
    assert operations(state) == [*((i, "forward_backward") for i in (1, 2, 3, 4)), (5, "optim_step")]


def test_it_submits_at_once(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer, hold_until=4) as (url, _):
        facts = facts_of(run_client(CASES, "submits_at_once", url=url))
    assert facts["losses"] == [GOOD_LOSS] * 3
    assert facts["metrics"] == {"loss:sum": pytest.approx(-sum(GOOD_LOGPROBS)), "loss_weight:sum": 3.0}
    assert facts["same_again"]
    assert facts["is_tinker_result"]
    assert facts["num_logprobs"] == 3
    assert facts["step"] == {"step": 1.0}


def test_it_can_be_awaited_once_or_twice(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer) as (url, _):
        facts = facts_of(run_client(CASES, "awaits_once_or_twice", url=url))
    assert facts["losses"] == [GOOD_LOSS] * 6
    assert facts["step"] == {"step": 1.0}
    assert facts["path"].endswith("/weights/state")


def test_one_failed_future_leaves_the_others(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer) as (url, _):
        facts = facts_of(run_client(CASES, "fails_one_of_three", url=url))
    assert "token 5000 is outside the vocabulary of 1000" in facts["error"]
    assert facts["others"] == [GOOD_LOSS] * 2
    assert facts["step"] == {"step": 1.0}
    assert facts["empty_error"] == "ValueError"


def test_awaiting_leaves_the_loop_free(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer, hold_until=2) as (url, _):
        facts = facts_of(run_client(CASES, "leaves_the_loop_free", url=url))
    assert facts == {"loss": GOOD_LOSS, "step": {"step": 1.0}}


def test_giving_up_waiting_does_not_end_the_operation(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer, hold_until=2) as (url, _):
        facts = facts_of(run_client(CASES, "survives_giving_up", url=url))
    assert facts == {
        "errors": ["TimeoutError"] * 3,
        "was_done": False,
        "loss": GOOD_LOSS,
        "step": {"step": 1.0},
    }


def test_operations_keep_the_order_of_the_calls(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer) as (url, state):
        facts = facts_of(run_client(CASES, "keeps_the_order", url=url))
    assert facts["loss"] == pytest.approx(facts["expected_loss"], abs=1e-5)
    assert facts["mine"] == 1.0
    assert facts["steps"] == [1.0, 1.0]
    assert facts["path"].endswith("/sampler_weights/named")
    assert facts["num_sequences"] == 2
    assert [path for _, path in operations(state)][1:] == [
        "forward_backward",
        "optim_step",
        "save_weights_for_sampler",
        "save_weights_for_sampler",
        "optim_step",
    ]


def test_a_broken_custom_loss_raises_from_its_future(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer) as (url, _):
        facts = facts_of(run_client(CASES, "survives_a_failing_custom_loss", url=url))
    assert facts == {"error": "my loss is broken", "step": {"step": 0.0}}


def test_all_clients_and_methods(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer) as (url, _):
        facts = facts_of(run_client(CASES, "covers_every_client", url=url))
    assert facts["models"] == ["mintweb/tiny"]
    assert facts["classes"] == ["mint.rest", "mint.sampling", "mint.training"]
    assert facts["info"] == 4
    assert facts["loaded"] == "LoadWeightsResponse"
    assert facts["resumed_ids"] == 3
    assert facts["resumed_steps"] == [1.0, 1.0]
    assert facts["num_sequences"] == [2] * 4
    assert facts["stop_reasons"] == ["stop", "stop"]
    assert facts["cloned"] == 1
    assert facts["logprobs"] == [None, pytest.approx(-2.2), pytest.approx(-2.3)]
    assert facts["base_model"]
    assert facts["num_runs"] == 3
    assert facts["checkpoints"] == ["weights/s1", "sampler_weights/s2"]


@pytest.mark.parametrize("key", ["tml", "sk"])
@pytest.mark.parametrize("accepts_sk_keys", [True, False])
def test_synchronous_use_with_either_key(
    run_client: RunClient, tokenizer: Path, key: str, accepts_sk_keys: bool
) -> None:
    with running(tokenizer, accepts_sk_keys=accepts_sk_keys) as (url, state):
        facts = facts_of(run_client(CASES, "works_without_a_loop", url=url, key=key))
    assert facts["models"] == 1
    assert facts["loss"] == GOOD_LOSS
    assert facts["step"] == {"step": 1.0}
    assert facts["resumed"]
    assert facts["tokens"] == [0, 1, 2]
    assert facts["logprobs"] == [None, pytest.approx(-1.2), pytest.approx(-1.3)]
    assert facts["is_future"]
    sent = {body["api_key"].split("-")[0][:3] for path, body in state.log if path == "create_model"}
    assert sent == ({"eyJ"} if accepts_sk_keys else {key})


def test_extensions(run_client: RunClient, tokenizer: Path) -> None:
    with running(tokenizer) as (url, state):
        facts = facts_of(run_client(CASES, "reaches_the_extensions", url=url))
    assert facts == {"kl": [0.5], "metrics": {"kl": 0.5}, "merged": "tinker://merged/sampler_weights/m"}
    request = next(body for path, body in state.log if path == "mint/forward_backward_reverse_kl")
    assert request["seq_id"] is None
    assert request["data"][0]["target_tokens"] == {"data": [2, 3], "shape": [2], "dtype": "int64"}


def test_no_async_method_is_left_a_coroutine(run_client: RunClient) -> None:
    facts = facts_of(run_client(CASES, "lists_coroutines", url=""))
    assert facts["coroutines"] == []
    assert facts["num_methods"] > 30


def test_mint_variables_go_before_tinker_variables(run_client: RunClient) -> None:
    script = (
        "import json, os, mint; print(json.dumps({k: v for k, v in os.environ.items() if 'TINKER_' in k}))"
    )
    facts = facts_of(
        run_client("-c", script, url="http://mint", MINT_API_KEY="tml-a", TINKER_API_KEY="tml-b")
    )
    assert facts["TINKER_BASE_URL"] == "http://mint"
    assert facts["TINKER_API_KEY"] == "tml-a"


def test_the_default_server_is_this_machine(run_client: RunClient) -> None:
    script = """if True:
        import json, os
        del os.environ["MINT_BASE_URL"], os.environ["TINKER_BASE_URL"]
        import mint
        print(json.dumps({"url": os.environ["TINKER_BASE_URL"]}))
    """
    assert facts_of(run_client("-c", script, url="")) == {"url": "http://127.0.0.1:8000"}


@pytest.mark.parametrize("client_env", ["mint022"], indirect=True)
def test_it_has_all_that_the_published_mint_exports(run_client: RunClient) -> None:
    own = facts_of(run_client(CASES, "lists_exports", url=""))
    script = "import json, mint; print(json.dumps({'top': mint.__all__, 'mint': mint.mint.__all__}))"
    published = facts_of(run_client("-c", script, url="", own_mint=False))
    assert set(published["top"]) <= set(own["top"])
    assert set(published["mint"]) <= set(own["mint"])


@pytest.mark.parametrize("own_mint", [True, False])
def test_the_training_example(run_client: RunClient, tokenizer: Path, tmp_path: Path, own_mint: bool) -> None:
    data = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    with running(tokenizer) as (url, _):
        process = run_client(
            ROOT / "examples" / "sft_loop.py",
            url=url,
            own_mint=own_mint,
            key="tml",
            SFT_DATA=str(data),
            SFT_STEPS="6",
            PYTHONWARNINGS="default",
        )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("before  Who? -> ")
    assert lines[-1].startswith("after   Who? -> ")
    losses = [float(line.split()[-1]) for line in lines[1:-1]]
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] + 0.5


@pytest.mark.parametrize("own_mint", [True, False])
def test_every_scenario_for_the_real_server_runs(
    run_client: RunClient, tokenizer: Path, own_mint: bool
) -> None:
    script = ROOT / "tests" / "e2e" / "sdk_scenarios"
    with running(tokenizer) as (url, _):
        process = run_client(script, "all", url=url, own_mint=own_mint, PYTHONWARNINGS="default")
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert [line["failed"] for line in lines if "failed" in line] == []
    assert process.returncode == 0, process.stderr
    assert len({line["scenario"] for line in lines}) == len(lines) >= 30
