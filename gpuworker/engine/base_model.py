"""The frozen base model: loading, routed projections and the packed forward pass.

transformers' own modules stay; only the targeted nn.Linear layers and the attention function
are replaced. Called by training and sampling, knows neither.
Axes: T rows of the packed batch, D hidden features, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gpuworker.engine import activations, attention, norms, rotary, tensor_parallel
from gpuworker.engine.adapters import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, UNEMBED, ModuleShape
from gpuworker.engine.attention import PackedAttention
from gpuworker.engine.batching import PackedRows, pack_rows
from gpuworker.engine.exceptions import BaseModelError
from gpuworker.engine.lora import Attention, Products, Route, RoutedLinear, SampledProduct
from gpuworker.engine.memory import available_bytes
from gpuworker.engine.precision import plain_logprobs, probe_sequences, read_fitting
from gpuworker.engine.products import FrozenWeight, frozen_linear, pack
from gpuworker.engine.row_probe import find_row_step
from gpuworker.engine.tensor_parallel import ALONE, ProcessGroup

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_NEEDED_SETTINGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
)
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


class BaseModel:
    """A causal language model whose projections are routed to adapters row by row.

    Args:
        group: the processes that hold a part of the projections each.
    """

    def __init__(
        self, model: nn.Module, directory: Path, *, precision: str, group: ProcessGroup = ALONE
    ) -> None:
        self.directory = directory
        self.precision = precision
        self.group = group
        config: Any = model.config
        self.config = config
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.route = Route()
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.modules = _route_projections(model, self.route)
        attention.install(model, self.route)
        norms.fuse(model)
        rotary.fuse(model)
        if self.device.type == "cpu":
            activations.steady(model)
        self._decoder: nn.Module = getattr(model, str(model.base_model_prefix))
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.head_weight = FrozenWeight(head.weight)
        self.logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.has_softcapped_attention = getattr(config, "attn_logit_softcapping", None) is not None
        self.vocab_size = int(head.weight.shape[0])
        self.max_context = int(config.max_position_embeddings)
        self.end_tokens = _read_end_tokens(directory, config)
        routed = [module for module in model.modules() if isinstance(module, RoutedLinear)]
        self.groups = _name_groups(routed, self.modules)
        tensor_parallel.keep_share(routed, group)
        self.num_held_parameters = sum(parameter.numel() for parameter in model.parameters())
        frozen = [*(module.frozen for module in routed), self.head_weight]
        self.row_step = group.most(find_row_step([weight.plain for weight in frozen], frozen_linear))
        copied = pack(frozen, room_bytes=available_bytes() // 4) if self.device.type == "cpu" else 0
        self.num_weight_bytes = self.num_held_parameters * self.dtype.itemsize + copied

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Return the named buffers of the decoder, such as rotary frequencies."""
        return self._decoder.named_buffers()

    @contextmanager
    def routed(
        self, products: Sequence[Products], attend: Attention, *, sampled: SampledProduct | None = None
    ) -> Iterator[None]:
        """Route the model to one batch for the length of the block: its forward and backward."""
        self.route.products, self.route.attention = products, attend
        self.route.sampled = sampled
        try:
            yield
        finally:
            self.route.clear()

    def cache_bytes_per_position(self, dtype: torch.dtype) -> int:
        """Return the size of the keys and values of one token in all layers."""
        config = self.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        num_values = 2 * config.num_hidden_layers * num_heads * size // self.group.share.size
        return int(num_values) * dtype.itemsize

    def place(self, values: npt.NDArray[Any]) -> Tensor:
        """Return an array on the model's device; a copy to CUDA does not wait for what runs there."""
        tensor = torch.from_numpy(values)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
        )

    def hidden(self, rows: PackedRows) -> Tensor:
        """Return the last hidden states, normed, as the head takes them; use inside `routed`.

        Shapes:
            returns (T, D), with a gradient where a trained segment asks for it.
        """
        return self.hidden_of(self.place(rows.tokens_T), self.place(rows.positions_T))

    def hidden_of(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """Return what `hidden` does, of tokens and positions (T,) that are on the device."""
        output = self._decoder(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD


def load(directory: Path, *, device: str, dtype: str, group: ProcessGroup = ALONE) -> BaseModel:
    """Load a Hugging Face causal language model from a directory of safetensors and JSON.

    Args:
        device: a torch device, or "auto" for CUDA where there is one.
        dtype: "float32", "bfloat16" or "auto": bfloat16 on CUDA, on a CPU what `precision` finds fitting, but
            float32 in a group, whose processes need not find the same.
        group: the processes that load this model together, each a part.
    Raises:
        BaseModelError: the directory is no such model, or the model has a part that the engine
            cannot reproduce; the message names it.
    """
    target = _choose_device(device)
    wanted = _choose_dtype(dtype, target) or (None if group.is_alone else torch.float32)
    config = _read_config(directory)
    if not group.is_alone:
        tensor_parallel.check_config(config, group.share, str(directory), device=target)
    read = partial(_read_model, directory, config, device=target, group=group)
    model, reason = read_fitting(read) if wanted is None else (read(wanted), _reason(dtype, wanted, target))
    probe = _Probe(model)
    base = BaseModel(model, directory, precision=reason, group=group)
    probe.compare(base)
    return base


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise BaseModelError(f"device {device!r} is unknown; use auto, cpu or cuda") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device {device!r} is wanted but this machine has no usable CUDA device")
    return target


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype, None where the model has to be tried first."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    if dtype not in _DTYPES:
        raise BaseModelError(f"dtype {dtype!r} is unknown; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _reason(asked: str, dtype: torch.dtype, device: torch.device) -> str:
    name = str(dtype).removeprefix("torch.")
    if asked != "auto":
        return f"{name}: as configured"
    return f"{name}: the rule on {'CUDA' if device.type == 'cuda' else 'several CPU processes'}"


def _read_config(directory: Path) -> Any:
    if not (directory / "config.json").is_file():
        raise BaseModelError(f"{directory} holds no config.json, so it is not a model directory")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"config.json of {directory} cannot be used: {error}") from error
    for name in _NEEDED_SETTINGS:
        if not isinstance(getattr(config, name, None), int):
            raise BaseModelError(f"config.json of {directory} has no {name}: not a plain language model")
    for rope in _rope_settings(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            raise BaseModelError(
                f"rope_type {rope['rope_type']!r} makes a sequence depend on its neighbours: not supported"
            )
    return config


def _rope_settings(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rope settings of a model, one of all layers or one of each kind of layer."""
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def _read_model(
    directory: Path, config: Any, dtype: torch.dtype, *, device: torch.device, group: ProcessGroup
) -> nn.Module:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **tensor_parallel.reading_options(group.share),
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"the weights of {directory} cannot be loaded: {error}") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        odd = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise BaseModelError(f"weights of {directory} are missing or of the wrong shape: {odd[:3]}")
    checked: nn.Module = model.to(device).eval()
    checked.requires_grad_(False)
    _keep_rotary_precision(checked)
    return checked


def _keep_rotary_precision(model: nn.Module) -> None:
    """Refuse rotary frequencies in half precision: they alone double the gradient error."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise BaseModelError(f"{name} was loaded as {buffer.dtype} instead of float32")


def _route_projections(model: nn.Module, route: Route) -> tuple[ModuleShape, ...]:
    """Replace every targeted projection by a routed one and return their names and sizes.

    Raises:
        BaseModelError: a layer lacks one of the projections, as with fused qkv or experts.
    """
    wanted = (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    ]
    num_layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    for projection in wanted:
        count = sum(name.endswith(f".{projection}") for name, _ in found)
        if count != num_layers:
            raise BaseModelError(
                f"{type(model).__name__} has {count} linear layers named {projection} in {num_layers} "
                "layers: fused, shared or expert projections are not supported"
            )
    for name, module in found:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, RoutedLinear(module, name, route))
    _group_projections(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(model, UNEMBED, None), nn.Linear) or head.bias is not None:
        raise BaseModelError(f"{type(model).__name__} has no {UNEMBED} without bias")
    shapes = [ModuleShape(name, module.in_features, module.out_features) for name, module in found]
    return (*shapes, ModuleShape(UNEMBED, head.in_features, head.out_features))


def _group_projections(model: nn.Module) -> None:
    """Tell the routed projections of one parent which of them read the same input."""
    for parent in model.modules():
        for names in _SHARED_INPUT:
            group = tuple(getattr(parent, name) for name in names if hasattr(parent, name))
            for layer in group:
                layer.group = group


def _name_groups(
    routed: Sequence[RoutedLinear], modules: Sequence[ModuleShape]
) -> tuple[tuple[ModuleShape, ...], ...]:
    """Return the projections, those together that read the same rows; the last one is the head."""
    known = {module.name: module for module in modules}
    groups = dict.fromkeys(layer.group for layer in routed)
    return (*(tuple(known[layer.name] for layer in group) for group in groups), (known[UNEMBED],))


def _read_end_tokens(directory: Path, config: Any) -> tuple[int, ...]:
    """Return the end tokens of generation_config.json, else of config.json."""
    path = directory / "generation_config.json"
    stored = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = stored if stored is not None else getattr(config, "eos_token_id", None)
    if ids is None:
        return ()
    return (int(ids),) if isinstance(ids, int) else tuple(int(i) for i in ids)


class _Probe:
    """Two short sequences through the untouched model, to compare the routed one with.

    Catches what names and shapes do not show: attention sinks, scaled logits, other masks.
    """

    TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}

    def __init__(self, model: nn.Module) -> None:
        self.expected = plain_logprobs(model)
        self.sequences = probe_sequences(self.expected.shape[1])

    def compare(self, base: BaseModel) -> None:
        """Raise BaseModelError where the routed model does not give the same log-probabilities."""
        rows = pack_rows([(tokens, 0) for tokens in self.sequences])
        attend = PackedAttention(rows.lengths, device=base.device)
        with torch.no_grad(), base.routed((), attend):
            hidden_TD = base.hidden(rows)[: len(self.expected)]
            logits = hidden_TD.mm(base.head_weight.plain.t()).float()
            if base.logit_softcap is not None:
                logits = base.logit_softcap * torch.tanh(logits / base.logit_softcap)
        worst = (logits.log_softmax(-1) - self.expected).abs().max().item()
        if not worst <= self.TOLERANCE[base.dtype]:
            raise BaseModelError(
                f"log-probabilities differ by {worst:.3g} from those of transformers: the model has a "
                "feature that this engine does not reproduce, or weights that are not finite"
            )
