"""What is saved, listed, loaded and deleted."""
# mypy: ignore-errors

from __future__ import annotations

from client import (
    error_of,
    forward_logprobs,
    max_difference,
    new_client,
    new_service,
    ready,
    rest_client,
    step,
)


def save_and_load():
    client = new_client()
    step(client)
    saved = forward_logprobs(client)
    path = client.save_state("s1").result().path
    onward = [step(client), step(client), step(client)]
    later = forward_logprobs(client)
    client.load_state(path).result()
    without_optimizer = forward_logprobs(client)
    fresh = [step(client), step(client), step(client)]
    client.load_state_with_optimizer(path).result()
    with_optimizer = forward_logprobs(client)
    resumed = [step(client), step(client), step(client)]
    return {
        "path": path,
        "moved_on": max_difference(saved, later),
        "weights_difference": max_difference(saved, without_optimizer),
        "weights_difference_with_optimizer": max_difference(saved, with_optimizer),
        "resumed_difference": max_difference(onward, resumed),
        "resumed_logprob_difference": max_difference(later, forward_logprobs(client)),
        "fresh_optimizer_difference": max_difference(onward, fresh),
        "same_name_again": error_of(lambda: client.save_state("s1").result()),
        "overwritten": client.save_state("s1", overwrite=True).result().path == path,
        "unknown_path": error_of(lambda: client.load_state(path.replace("s1", "s2")).result()),
    }


def create_from_state():
    service = new_service()
    client = new_client(service, rank=4)
    step(client)
    saved = forward_logprobs(client)
    path = client.save_state("s1").result().path
    onward = [step(client), step(client), step(client)]
    plain = ready(service.create_training_client_from_state(path))
    full = ready(service.create_training_client_from_state_with_optimizer(path))
    facts = {
        "model_ids": [str(c.model_id) for c in (client, plain, full)],
        "ranks": [c.get_info().lora_rank for c in (client, plain, full)],
        "weights_difference": max_difference(saved, forward_logprobs(plain)),
        "weights_difference_with_optimizer": max_difference(saved, forward_logprobs(full)),
    }
    fresh = [step(plain), step(plain), step(plain)]
    resumed = [step(full), step(full), step(full)]
    facts["resumed_difference"] = max_difference(onward, resumed)
    facts["fresh_optimizer_difference"] = max_difference(onward, fresh)
    return facts


def listings():
    service = new_service()
    client = new_client(service, rank=4)
    step(client)
    state = client.save_state("s1").result().path
    named = client.save_weights_for_sampler("n1").result().path
    rest = rest_client(service)
    run = rest.get_training_run(client.model_id).result()
    by_path = rest.get_training_run_by_tinker_path(state).result()
    runs = rest.list_training_runs(limit=100).result()
    own = rest.list_checkpoints(client.model_id).result().checkpoints
    everything = rest.list_user_checkpoints(limit=100).result().checkpoints
    info = rest.get_weights_info_by_tinker_path(state).result()
    session_id = client.model_id.split(":")[0]
    return {
        "paths": [state, named],
        "run": {"id": run.training_run_id, "base_model": run.base_model, "rank": run.lora_rank},
        "by_path": by_path.training_run_id == run.training_run_id,
        "is_listed": client.model_id in [r.training_run_id for r in runs.training_runs],
        "total": runs.cursor.total_count,
        "checkpoints": sorted(c.tinker_path for c in own),
        "are_listed": {state, named} <= {c.tinker_path for c in everything},
        "weights": {"base_model": info.base_model, "is_lora": info.is_lora, "rank": info.lora_rank},
        "session_runs": list(rest.get_session(session_id).result().training_run_ids),
        "session_is_listed": session_id in rest.list_sessions(limit=1000).result().sessions,
        "unknown_run": error_of(lambda: rest.get_training_run("no-such:train:0").result()),
    }


def checkpoint_management():
    service = new_service()
    client = new_client(service, rank=4)
    step(client)
    path = client.save_state("s1").result().path
    expiring = client.save_state("s2", ttl_seconds=7200).result().path
    rest = rest_client(service)

    def checkpoint(wanted):
        found = rest.list_checkpoints(client.model_id).result().checkpoints
        return next((c for c in found if c.tinker_path == wanted), None)

    rest.publish_checkpoint_from_tinker_path(path).result()
    facts = {"published": checkpoint(path).public}
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    facts["unpublished"] = not checkpoint(path).public
    facts["saved_with_ttl"] = checkpoint(expiring).expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    facts["expires"] = checkpoint(path).expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    facts["lasts"] = checkpoint(path).expires_at is None
    rest.delete_checkpoint_from_tinker_path(path).result()
    facts["deleted"] = checkpoint(path) is None
    facts["loading_the_deleted"] = error_of(lambda: client.load_state(path).result())
    facts["still_works"] = step(client)
    return facts


SCENARIOS = (save_and_load, create_from_state, listings, checkpoint_management)
