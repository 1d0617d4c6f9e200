"""The unmodified clients, and our own mint package, against the running product."""

from __future__ import annotations

from typing import Any

import pytest

from runs.services import operations
from tests.e2e.conftest import GUIDE_MODEL, MINT022, OWN022, OWN038, ROOT, TINKER038, Sdk
from tests.up.instances import Instance

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]
Facts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=[MINT022, TINKER038], ids=lambda sdk: sdk.name)
def facts(request: pytest.FixtureRequest, sdk_env: dict[str, str]) -> Facts:
    """What every scenario found with one client."""
    sdk: Sdk = request.param
    return sdk.facts("all", env=sdk_env)


def test_models_and_tokenizers(facts: Facts) -> None:
    assert ["mintweb/tiny", 2048] in facts["capabilities"]["models"]
    assert facts["get_info"]["lora_rank"] == 4
    assert facts["get_tokenizer"]["text"] == facts["get_tokenizer"]["expected_text"]
    assert "<|im_start|>" in facts["get_tokenizer"]["chat"]
    assert "unknown base model 'no/such'" in facts["create_lora_training_client"]["unknown_model"]["text"]
    model_ids = facts["create_lora_training_client"]["model_ids"]
    assert [model_id.rpartition(":")[2] for model_id in model_ids] == ["0", "1"]


def test_forward_and_losses(facts: Facts) -> None:
    forward = facts["forward"]
    assert forward["lengths"] == [7, 3]
    assert forward["loss_sum"] == pytest.approx(forward["expected_loss_sum"], rel=1e-6)
    assert forward["changed_by_step_without_gradient"] == 0.0
    for scenario in ("losses", "off_policy_losses"):
        for name in ("importance_sampling", "ppo", "cispo", "dro"):
            found = facts[scenario][name]
            assert found["loss_sum"] == pytest.approx(found["expected"], rel=1e-5), name
    assert "cross_entropy, importance_sampling, ppo, cispo, dro" in facts["unknown_loss"]["error"]["text"]


def test_training(facts: Facts) -> None:
    assert facts["optim_step"]["change"] > 0
    assert facts["loss_falls"]["fell"]
    assert facts["accumulation"]["difference"] < 1e-4
    assert facts["hundred_batches"]["num_results"] == 200
    assert facts["hundred_batches"]["fell"]
    assert facts["concurrent_runs"]["difference"] == 0.0
    assert facts["custom_loss"]["difference"] < 1e-4
    assert facts["chunked_batch"]["num_outputs"] == 2500
    assert facts["chunked_batch"]["order_difference"] == 0.0


def test_failures_leave_the_rest_alone(facts: Facts) -> None:
    failed = facts["failed_future"]
    assert "outside the vocabulary" in failed["error"]["text"]
    assert len(failed["others"]) == 2
    assert failed["still_works"] < failed["others"][0]
    assert facts["out_of_vocabulary"]["target"]["text"].count("data[0].loss_fn_inputs.target_tokens[1]") >= 1


def test_an_operation_that_is_not_served_holds_up_nothing(facts: Facts) -> None:
    unserved = facts["unserved_operation"]
    if unserved["is_known"]:
        assert "use save_state" in unserved["error"]["text"]
        assert unserved["fell"]
        assert unserved["duration_s"] < operations.GAP_PATIENCE_S / 2


def test_saving_and_loading(facts: Facts) -> None:
    for scenario in ("save_and_load", "create_from_state"):
        found = facts[scenario]
        assert found["weights_difference"] == 0.0
        assert found["weights_difference_with_optimizer"] == 0.0
        assert found["resumed_difference"] == 0.0
        assert found["fresh_optimizer_difference"] > 0.0
    assert "exists" in facts["save_and_load"]["same_name_again"]["text"]
    assert facts["save_and_load"]["overwritten"]


def test_sampling(facts: Facts) -> None:
    named = facts["named_sampler"]
    assert named["greedy_is_top_1"]
    assert named["num_samples"] == 4
    assert named["repeats_with_seed"]
    assert named["stopped"]["stop_reason"] == "stop"
    assert named["stopped"]["tokens"][-1] == named["stop_token"]
    assert facts["unnamed_sampler"]["logprob_difference"] < 1e-4
    assert facts["unnamed_sampler"]["kept_after_training"]
    assert facts["stop_strings"]["stop_reason"] == "stop"
    assert facts["stop_strings"]["stop"] in facts["stop_strings"]["stopped_text"]
    assert facts["prompt_logprobs"]["first"] is None
    assert facts["prompt_logprobs"]["difference_to_forward"] < 1e-4
    assert facts["prompt_logprobs"]["topk_sorted"]
    assert facts["many_samples"]["num_replies"] == 200


def test_listing_and_managing(facts: Facts) -> None:
    assert facts["listings"]["is_listed"]
    assert facts["listings"]["are_listed"]
    assert (
        facts["checkpoint_management"] | {"published": True, "unpublished": True, "deleted": True}
        == facts["checkpoint_management"]
    )


@pytest.mark.parametrize("sdk", [OWN022, OWN038], ids=lambda sdk: sdk.name)
def test_our_mint_submits_at_once_and_keeps_good_futures_usable(sdk: Sdk, sdk_env: dict[str, str]) -> None:
    found = sdk.facts("guide_style", "double_await", "loss_falls", env=sdk_env)
    assert "outside the vocabulary" in found["guide_style"]["error"]
    assert len(found["guide_style"]["losses"]) == 2
    assert found["loss_falls"]["fell"]


@pytest.mark.parametrize("sdk", [OWN022, OWN038], ids=lambda sdk: sdk.name)
def test_the_guides_listing_runs_as_printed(sdk: Sdk, sdk_env: dict[str, str], product: Instance) -> None:
    script = ROOT / "examples" / "async_patterns.py"
    assert GUIDE_MODEL in script.read_text()
    done = sdk.run(script, env=sdk_env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loss: ") == 4


@pytest.mark.parametrize("sdk", [MINT022, TINKER038, OWN022, OWN038], ids=lambda sdk: sdk.name)
def test_the_first_loop_lowers_the_loss(sdk: Sdk, sdk_env: dict[str, str]) -> None:
    done = sdk.run(ROOT / "examples" / "sft_loop.py", env=sdk_env)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert "before" in done.stdout
    assert "after" in done.stdout
