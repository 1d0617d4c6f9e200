"""Adapter states as directories: PEFT files that plain `peft` loads, optimizer state beside them.

A directory appears complete or not at all (temporary name, fsync, rename); reading is strict.
Called by the worker; the engine itself works on `AdapterState`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpuworker import failpoints
from gpuworker.engine.adapters import AdapterState, Layout, ModuleShape, OptimizerState
from gpuworker.engine.exceptions import CheckpointError
from gpuworker.engine.types import LoraSpec

FORMAT_VERSION = 1
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_PREFIX = "base_model.model."


def write(
    state: AdapterState, directory: Path, *, base_model: str, fingerprint: Mapping[str, str] | None = None
) -> None:
    """Write a state as one directory, replacing what is there.

    The directory holds adapter_model.safetensors and adapter_config.json in PEFT's layout,
    state.json, and optimizer.safetensors where the state has moments or a gradient. It is built
    under a temporary name in the same parent and renamed once everything is on the disk.

    Args:
        base_model: recorded as `base_model_name_or_path`.
        fingerprint: what the numbers were computed with, see `Engine.fingerprint`.
    Raises:
        CheckpointError: the disk refuses.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise CheckpointError(f"the checkpoint cannot be written: {error}") from error
    try:
        _fill(state, scratch, base_model=base_model, fingerprint=fingerprint or {})
        scratch.chmod(0o755)
        failpoints.reach("snapshot_written")
        _replace(scratch, directory)
        failpoints.reach("snapshot_renamed")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(directory: Path) -> AdapterState:
    """Return the state of a directory that `write` made.

    Raises:
        CheckpointError: a file is missing, cut short, changed, or holds other tensors than it should.
    """
    meta = _read_meta(directory)
    try:
        spec, layout = _read_spec(meta), _read_layout(meta)
        step = int(meta["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{STATE_FILE} lacks something: {error!r}") from error
    for name, digest in meta["files"].items():
        _check_file(directory / Path(name).name, digest)
    weights = _flatten(_load(directory / ADAPTER_FILE), layout, name=ADAPTER_FILE)
    extra = _load(directory / OPTIMIZER_FILE) if OPTIMIZER_FILE in meta["files"] else {}
    for key, flat_P in extra.items():
        if flat_P.shape != weights.shape or flat_P.dtype != torch.float32:
            raise CheckpointError(f"{OPTIMIZER_FILE}: {key} is {flat_P.dtype} {tuple(flat_P.shape)}")
    if ("exp_avg" in extra) != ("exp_avg_sq" in extra):
        raise CheckpointError(f"{OPTIMIZER_FILE} holds one of exp_avg and exp_avg_sq only")
    moments = None
    if "exp_avg" in extra:
        moments = OptimizerState(exp_avg=extra["exp_avg"], exp_avg_sq=extra["exp_avg_sq"])
    return AdapterState(
        spec=spec,
        layout=layout,
        step=step,
        weights=weights,
        optimizer=moments,
        gradient=extra.get("gradient"),
    )


def _fill(state: AdapterState, scratch: Path, *, base_model: str, fingerprint: Mapping[str, str]) -> None:
    tensors = {
        f"{_PREFIX}{name}.lora_{factor}.weight": tensor.contiguous()
        for name, pair in state.layout.views(state.weights).items()
        for factor, tensor in (("A", pair.a), ("B", pair.b))
    }
    save_file(tensors, scratch / ADAPTER_FILE, metadata={"format": "pt"})
    extra = {"gradient": state.gradient} if state.gradient is not None else {}
    if state.optimizer is not None:
        extra |= {"exp_avg": state.optimizer.exp_avg, "exp_avg_sq": state.optimizer.exp_avg_sq}
    if extra:
        save_file(extra, scratch / OPTIMIZER_FILE)
    _write_json(scratch / CONFIG_FILE, _peft_config(state, base_model))
    meta = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "step": state.step,
        "spec": asdict(state.spec),
        "modules": [list(module) for module in state.layout.modules],
        "fingerprint": dict(fingerprint),
        "files": {path.name: _digest(path) for path in sorted(scratch.glob("*.safetensors"))},
    }
    _write_json(scratch / STATE_FILE, meta)
    for path in scratch.iterdir():
        _sync(path)
    _sync(scratch)


def _replace(scratch: Path, directory: Path) -> None:
    """Put the finished directory in its place; an older one steps aside first."""
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        directory.rename(old / directory.name)
        scratch.rename(directory)
        shutil.rmtree(old)
    else:
        scratch.rename(directory)
    _sync(directory.parent)


def _peft_config(state: AdapterState, base_model: str) -> dict[str, object]:
    projections = {module.projection for module in state.layout.modules}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": state.spec.rank,
        "lora_alpha": state.spec.alpha,
        "target_modules": sorted(projections),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = json.loads((directory / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{STATE_FILE} cannot be read: {error}") from error
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{STATE_FILE} is not of format {FORMAT_VERSION}")
    if not isinstance(meta.get("files"), dict) or ADAPTER_FILE not in meta["files"]:
        raise CheckpointError(f"{STATE_FILE} does not list {ADAPTER_FILE}")
    return meta


def _read_spec(meta: Mapping[str, Any]) -> LoraSpec:
    return LoraSpec(**meta["spec"])


def _read_layout(meta: Mapping[str, Any]) -> Layout:
    modules = tuple(
        ModuleShape(str(name), int(in_features), int(out_features))
        for name, in_features, out_features in meta["modules"]
    )
    return Layout(int(meta["spec"]["rank"]), modules)


def _flatten(tensors: dict[str, Tensor], layout: Layout, *, name: str) -> Tensor:
    """Return PEFT tensors in the flat order of the layout; every name, shape and dtype must fit."""
    flat_P = torch.empty(layout.num_parameters)
    for module, pair in layout.views(flat_P).items():
        for factor, view in (("A", pair.a), ("B", pair.b)):
            key = f"{_PREFIX}{module}.lora_{factor}.weight"
            tensor = tensors.pop(key, None)
            if tensor is None:
                raise CheckpointError(f"{name} lacks {key}")
            if tensor.dtype != torch.float32 or tensor.shape != view.shape:
                raise CheckpointError(
                    f"{name}: {key} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {tuple(view.shape)}"
                )
            view.copy_(tensor)
    if tensors:
        raise CheckpointError(f"{name} holds unknown tensors: {sorted(tensors)[:3]}")
    return flat_P


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error


def _check_file(path: Path, digest: object) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing")
    if _digest(path) != digest:
        raise CheckpointError(f"{path.name} is torn or was changed: its checksum differs")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
