from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from gpuworker.engine import checkpoints
from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import CheckpointError
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
)
from tests.flushes import Flushes

from .conftest import CONFIGS, load_reference, random_tokens
from .reference import make_adapter, peft_logprobs

STEP = AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=5.0)


def make_job(adapter_id: str, seed: int) -> ForwardBackward:
    tokens = random_tokens(np.random.default_rng(seed), 25)
    inputs = {"weights": np.ones(24, dtype=np.float32)}
    datum = Datum(tokens=tokens[:-1], target_tokens=tokens[1:], inputs=inputs)
    return ForwardBackward(adapter_id=adapter_id, data=(datum,), loss_fn="cross_entropy")


def train(engine: Engine, adapter_id: str, seeds: range) -> None:
    for seed in seeds:
        engine.forward_backward([make_job(adapter_id, seed)])
        engine.optim_step([OptimStep(adapter_id=adapter_id, params=STEP)])


def export(engine: Engine, adapter_id: str) -> AdapterState:
    return engine.export_state(adapter_id, optimizer=True, gradients=True)


def assert_same(actual: AdapterState, expected: AdapterState) -> None:
    assert (actual.spec, actual.layout, actual.step) == (expected.spec, expected.layout, expected.step)
    assert torch.equal(actual.weights, expected.weights)
    assert actual.optimizer is not None
    assert expected.optimizer is not None
    assert torch.equal(actual.optimizer.exp_avg, expected.optimizer.exp_avg)
    assert torch.equal(actual.optimizer.exp_avg_sq, expected.optimizer.exp_avg_sq)
    assert (actual.gradient is None) == (expected.gradient is None)
    if actual.gradient is not None and expected.gradient is not None:
        assert torch.equal(actual.gradient, expected.gradient)


@pytest.fixture
def state(engine: Engine) -> AdapterState:
    """A trained adapter in the middle of a step: moments and an accumulated gradient."""
    engine.create_adapter("trained", LoraSpec(rank=4, seed=31))
    train(engine, "trained", range(3))
    engine.forward_backward([make_job("trained", 3)])
    return export(engine, "trained")


def test_continuing_from_disk_equals_going_on(engine: Engine, state: AdapterState, tmp_path: Path) -> None:
    checkpoints.write(state, tmp_path / "c", base_model="tiny", fingerprint=engine.fingerprint)
    engine.import_state("resumed", checkpoints.read(tmp_path / "c"), optimizer=True)
    assert_same(export(engine, "resumed"), state)
    for adapter_id in ("trained", "resumed"):
        engine.optim_step([OptimStep(adapter_id=adapter_id, params=STEP)])
        train(engine, adapter_id, range(4, 7))
    assert_same(export(engine, "resumed"), export(engine, "trained"))
    assert export(engine, "resumed").step == 7


def test_import_without_optimizer_starts_afresh(engine: Engine, state: AdapterState) -> None:
    engine.import_state("trained", state, optimizer=False)
    after = export(engine, "trained")
    assert torch.equal(after.weights, state.weights)
    assert after.step == 0
    assert after.gradient is None
    assert after.optimizer is not None
    assert not after.optimizer.exp_avg.any()
    assert not after.optimizer.exp_avg_sq.any()


def test_an_exported_state_does_not_follow_the_adapter(engine: Engine, state: AdapterState) -> None:
    kept = state.weights.clone()
    engine.optim_step([OptimStep(adapter_id="trained", params=STEP)])
    assert torch.equal(state.weights, kept)
    engine.import_state("trained", state, optimizer=True)
    engine.optim_step([OptimStep(adapter_id="trained", params=STEP)])
    assert torch.equal(state.weights, kept)
    assert not torch.equal(export(engine, "trained").weights, kept)


def test_weights_alone_read_back_without_optimizer(
    engine: Engine, state: AdapterState, tmp_path: Path
) -> None:
    checkpoints.write(replace(state, optimizer=None, gradient=None), tmp_path / "w", base_model="tiny")
    assert not (tmp_path / "w" / checkpoints.OPTIMIZER_FILE).exists()
    read = checkpoints.read(tmp_path / "w")
    assert read.optimizer is None
    assert torch.equal(read.weights, state.weights)
    with pytest.raises(CheckpointError, match="weights only"):
        engine.import_state("trained", read, optimizer=True)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_plain_peft_loads_it_and_gives_the_same_logprobs(
    architecture: str,
    load_engine: Callable[..., Engine],
    model_directory: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Both tied (qwen3, gemma) and untied heads carry a trained lm_head."""
    engine = load_engine(architecture)
    make_adapter(engine, "export", LoraSpec(rank=4, seed=32))
    state = engine.export_state("export", optimizer=False, gradients=False)
    base = model_directory(architecture)
    checkpoints.write(state, tmp_path / "adapter", base_model=str(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        model = PeftModel.from_pretrained(load_reference(base), tmp_path / "adapter").eval()
    assert "lm_head" in model.peft_config["default"].target_modules
    job = make_job("export", 40)
    (result,) = engine.forward_backward([replace(job, backward=False)])
    assert isinstance(result, ForwardBackwardResult)
    expected = peft_logprobs(model, job.data[0]).detach()
    np.testing.assert_allclose(result.logprobs[0], expected, atol=3e-5, rtol=0)


def test_the_peft_config_names_what_was_trained(engine: Engine, tmp_path: Path) -> None:
    engine.create_adapter("attn", LoraSpec(rank=3, seed=1, train_mlp=False, train_unembed=False))
    state = engine.export_state("attn", optimizer=False, gradients=False)
    checkpoints.write(state, tmp_path / "attn", base_model="some/model")
    config = json.loads((tmp_path / "attn" / checkpoints.CONFIG_FILE).read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (3, 32.0)
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "some/model"
    keys = load_file(tmp_path / "attn" / checkpoints.ADAPTER_FILE).keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys


def test_writing_replaces_and_leaves_nothing_else(state: AdapterState, tmp_path: Path) -> None:
    checkpoints.write(state, tmp_path / "c", base_model="tiny")
    checkpoints.write(replace(state, step=9), tmp_path / "c", base_model="tiny")
    assert checkpoints.read(tmp_path / "c").step == 9
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_all_of_it_is_flushed_before_its_name_appears(
    state: AdapterState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = Flushes()
    flushes.watch(monkeypatch)
    checkpoints.write(state, tmp_path / "c", base_model="tiny")
    flushes.assert_safe(tmp_path / "c")


def test_a_failed_write_leaves_the_old_one(state: AdapterState, tmp_path: Path) -> None:
    checkpoints.write(state, tmp_path / "c", base_model="tiny")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoints.write(state, tmp_path / "file" / "c", base_model="tiny")
    assert_same(checkpoints.read(tmp_path / "c"), state)


def _edit(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Change tensors of one file and its checksum, as a foreign writer would."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / name)
        change(tensors)
        save_file(tensors, directory / name)
        meta = json.loads((directory / checkpoints.STATE_FILE).read_text())
        meta["files"][name] = checkpoints._digest(directory / name)
        (directory / checkpoints.STATE_FILE).write_text(json.dumps(meta))

    return apply


def _edit_meta(**changes: object) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        path = directory / checkpoints.STATE_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


KEY = "base_model.model.lm_head.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "state.json missing": (lambda d: (d / "state.json").unlink(), "state.json"),
    "state.json torn": (lambda d: (d / "state.json").write_text('{"step":'), "state.json"),
    "other format": (_edit_meta(format_version=99), "format"),
    "no step": (_edit_meta(step=None), "step|int"),
    "weights missing": (lambda d: (d / checkpoints.ADAPTER_FILE).unlink(), "missing"),
    "weights torn": (
        lambda d: (d / checkpoints.ADAPTER_FILE).write_bytes(
            (d / checkpoints.ADAPTER_FILE).read_bytes()[:-9]
        ),
        "torn",
    ),
    "optimizer missing": (lambda d: (d / checkpoints.OPTIMIZER_FILE).unlink(), "missing"),
    "one bit": (
        lambda d: (d / checkpoints.OPTIMIZER_FILE).write_bytes(
            (d / checkpoints.OPTIMIZER_FILE).read_bytes()[:-1] + b"\x55"
        ),
        "checksum",
    ),
    "key missing": (_edit(checkpoints.ADAPTER_FILE, lambda t: t.pop(KEY)), "lacks"),
    "key unknown": (_edit(checkpoints.ADAPTER_FILE, lambda t: t.update(more=torch.ones(1))), "unknown"),
    "wrong dtype": (_edit(checkpoints.ADAPTER_FILE, lambda t: t.update({KEY: t[KEY].half()})), "float16"),
    "wrong shape": (_edit(checkpoints.ADAPTER_FILE, lambda t: t.update({KEY: t[KEY][:1]})), "not float32"),
    "moment missing": (_edit(checkpoints.OPTIMIZER_FILE, lambda t: t.pop("exp_avg")), "one of"),
    "moment short": (_edit(checkpoints.OPTIMIZER_FILE, lambda t: t.update(exp_avg=torch.ones(3))), "exp_avg"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_it_refuses_damaged_directories(case: str, state: AdapterState, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    checkpoints.write(state, tmp_path / "c", base_model="tiny")
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(tmp_path / "c")
