"""The slow, plain way to the same numbers: transformers plus peft, one sequence at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from gpuworker.engine.adapters import AdapterState, LoraPair
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import Datum, Float32Array, LoraSpec


def randomize(engine: Engine, adapter_id: str, *, seed: int) -> AdapterState:
    """Give an adapter random A and B, so that every gradient is non-zero; return its state."""
    state = engine.export_state(adapter_id, optimizer=False, gradients=False)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(state.weights.shape, generator=generator) * 0.05
    state = replace(state, weights=weights)
    engine.import_state(adapter_id, state, optimizer=False)
    return state


def make_adapter(engine: Engine, adapter_id: str, spec: LoraSpec) -> AdapterState:
    engine.create_adapter(adapter_id, spec)
    return randomize(engine, adapter_id, seed=spec.seed)


def peft_model(model: PreTrainedModel, state: AdapterState) -> PeftModel:
    """Return the plain model under plain peft with the weights of an engine adapter."""
    spec = state.spec
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha),
        lora_dropout=0.0,
        target_modules=sorted({module.projection for module in state.layout.modules}),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft reads a deprecated name of transformers, and warns that an lm_head adapter does not
        # change tied embeddings: that is what we want.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, pair in state.layout.views(state.weights).items():
            module = wrapped.base_model.model.get_submodule(name)
            module.lora_A["default"].weight.copy_(pair.a)
            module.lora_B["default"].weight.copy_(pair.b)
    return wrapped.eval()


def peft_logprobs(model: torch.nn.Module, datum: Datum) -> torch.Tensor:
    """Return log-probabilities of the targets, shaped like them, with autograd."""
    logits = model(torch.from_numpy(datum.tokens)[None]).logits[0]
    targets = torch.from_numpy(datum.target_tokens).reshape(len(datum.tokens), -1)
    chosen: torch.Tensor = logits.log_softmax(-1).gather(1, targets)
    return chosen.reshape(datum.target_tokens.shape)


def peft_cross_entropy(
    model: PeftModel, state: AdapterState, data: Sequence[Datum]
) -> tuple[list[Float32Array], dict[str, LoraPair]]:
    """Return log-probabilities of each datum and the gradients of the summed loss."""
    logprobs = [peft_logprobs(model, datum) for datum in data]
    terms = [
        -(torch.from_numpy(datum.inputs["weights"]) * p).sum()
        for datum, p in zip(data, logprobs, strict=True)
    ]
    loss = torch.stack(terms).sum()
    model.zero_grad()
    loss.backward()
    gradients = {}
    for module in state.layout.modules:
        layer = model.base_model.model.get_submodule(module.name)
        gradients[module.name] = LoraPair(
            layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        )
    return [p.detach().numpy() for p in logprobs], gradients


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare gradients: 1e-4 of the largest entry, as single entries may cancel to nothing."""
    scale = expected.abs().max().item()
    assert scale > 0, "a gradient that is zero everywhere would prove nothing"
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4 * scale)
