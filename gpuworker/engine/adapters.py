"""The state of one LoRA adapter in flat buffers, and the copies that leave and enter it.

Knows tensors and module shapes, not the base model's code; the engine holds one `Adapter` per run.
Axes: P all parameters of one adapter, R rank, D input and F output features of one projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gpuworker.engine.exceptions import CheckpointError, LoraSpecError
from gpuworker.engine.types import LoraSpec

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROWWISE_PROJECTIONS = ("o_proj", "down_proj")
"""Those that several processes split by input features; they split the others by output features."""
UNEMBED = "lm_head"


class ModuleShape(NamedTuple):
    """One projection that an adapter may change: its dotted name in the base model and its size."""

    name: str
    in_features: int
    out_features: int

    @property
    def projection(self) -> str:
        """Return the last part of the name, such as `q_proj`."""
        return self.name.rpartition(".")[2]


class LoraPair(NamedTuple):
    """The two factors of one projection: a_RD and b_FR."""

    a: Tensor
    b: Tensor


class Share(NamedTuple):
    """Which of `size` equal parts of every split projection a process computes."""

    position: int
    size: int

    def of(self, module: ModuleShape, pair: LoraPair) -> LoraPair:
        """Return what the part needs of two factors, (..., R, D) and (..., F, R), as views."""
        if module.projection in ROWWISE_PROJECTIONS:
            return LoraPair(pair.a[..., self._part(module.in_features)], pair.b)
        if module.name == UNEMBED:
            return pair
        return LoraPair(pair.a, pair.b[..., self._part(module.out_features), :])

    def _part(self, num_features: int) -> slice:
        length = num_features // self.size
        return slice(self.position * length, (self.position + 1) * length)


WHOLE = Share(0, 1)


class Layout(NamedTuple):
    """Where each factor of an adapter lies in its flat buffers: all A and B, module after module."""

    rank: int
    modules: tuple[ModuleShape, ...]
    share: Share = WHOLE

    @property
    def num_parameters(self) -> int:
        """Return P, the length of the flat buffers."""
        return sum(self.rank * (module.in_features + module.out_features) for module in self.modules)

    def views(self, flat_P: Tensor) -> FactorViews:
        """Return the factors of every module as views into one flat buffer, or into rows of them, (..., P)."""
        return FactorViews(self, flat_P, WHOLE)

    def own_views(self, flat_P: Tensor) -> FactorViews:
        """Return the factors as `views` does, of split projections only what this process computes with."""
        return FactorViews(self, flat_P, self.share)


class FactorViews(Mapping[str, LoraPair]):
    """The factors of an adapter by module, each made when it is first asked for: there are hundreds, and not all are used.

    Shapes:
        flat_P: one flat buffer, or rows of them, (..., P).
    """

    def __init__(self, layout: Layout, flat_P: Tensor, share: Share) -> None:
        self.layout = layout
        self.flat_P = flat_P
        self._places = _places(layout)
        self._share = share
        self._made: dict[str, LoraPair] = {}

    def __getitem__(self, name: str) -> LoraPair:
        if name not in self._made:
            self._made[name] = self._make(*self._places[name])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _make(self, start: int, module: ModuleShape) -> LoraPair:
        rank, flat_P = self.layout.rank, self.flat_P
        size_a, size_b = rank * module.in_features, rank * module.out_features
        a_RD = flat_P.narrow(-1, start, size_a).view(*flat_P.shape[:-1], rank, module.in_features)
        b_FR = flat_P.narrow(-1, start + size_a, size_b).view(*flat_P.shape[:-1], module.out_features, rank)
        return LoraPair(a_RD, b_FR) if self._share == WHOLE else self._share.of(module, LoraPair(a_RD, b_FR))


class LoraWeights(NamedTuple):
    """What a forward pass needs of an adapter; `scaling` is alpha / rank."""

    pairs: FactorViews
    scaling: float


@lru_cache(maxsize=256)
def _places(layout: Layout) -> dict[str, tuple[int, ModuleShape]]:
    """Return where the factors of each module begin in a flat buffer, A before B."""
    places, start = {}, 0
    for module in layout.modules:
        places[module.name] = start, module
        start += layout.rank * (module.in_features + module.out_features)
    return places


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Adam moments of one adapter, flat float32 on the host."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True, kw_only=True)
class AdapterState:
    """A host copy of one adapter: what checkpoints hold.

    `step` counts applied optimizer steps. `gradient` is the accumulated, not yet applied gradient.

    Shapes:
        weights, gradient and both moments: float32, (P,), in the order of `layout`.
    """

    spec: LoraSpec
    layout: Layout
    step: int
    weights: Tensor
    optimizer: OptimizerState | None
    gradient: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Return the host memory that the copy takes."""
        moments = (self.optimizer.exp_avg, self.optimizer.exp_avg_sq) if self.optimizer is not None else ()
        return sum(one.nbytes for one in (self.weights, *moments, self.gradient) if one is not None)


def select_modules(
    spec: LoraSpec, modules: tuple[ModuleShape, ...], *, max_rank: int, share: Share = WHOLE
) -> Layout:
    """Return the layout of an adapter on the given base model projections.

    Raises:
        LoraSpecError: a rank outside 1..max_rank, an alpha that is not positive, or no trained part.
    """
    if not 1 <= spec.rank <= max_rank:
        raise LoraSpecError(f"rank {spec.rank} is outside 1..{max_rank}")
    if not (math.isfinite(spec.alpha) and spec.alpha > 0):
        raise LoraSpecError(f"alpha {spec.alpha} is not a positive number")
    wanted: set[str] = set()
    wanted.update(ATTENTION_PROJECTIONS if spec.train_attn else ())
    wanted.update(MLP_PROJECTIONS if spec.train_mlp else ())
    wanted.update((UNEMBED,) if spec.train_unembed else ())
    if not wanted:
        raise LoraSpecError("at least one of train_attn, train_mlp and train_unembed must be true")
    return Layout(spec.rank, tuple(module for module in modules if module.projection in wanted), share)


def held_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Return the memory of one adapter: master weights, two moments, a gradient, and the copy in `dtype`."""
    working = 0 if dtype == torch.float32 else dtype.itemsize
    return layout.num_parameters * (4 * torch.float32.itemsize + working)


class Adapter:
    """Float32 master weights, accumulated gradient and Adam moments of one run.

    `weights` are views of `working_P`, the copy in the dtype of the base model; `refresh` renews it after
    a change. An adapter that was moved to the host rests there: its weights are of use on the base
    model's device only.
    """

    def __init__(self, spec: LoraSpec, layout: Layout, *, device: torch.device, dtype: torch.dtype) -> None:
        num_parameters = layout.num_parameters
        self.spec = spec
        self.layout = layout
        self.num_bytes = held_bytes(layout, dtype)
        self._dtype = dtype
        self.step = 0
        self.master_P = torch.zeros(num_parameters, device=device)
        self.exp_avg_P = torch.zeros(num_parameters, device=device)
        self.exp_avg_sq_P = torch.zeros(num_parameters, device=device)
        self.gradient_P: Tensor | None = None
        self._work_with(self.master_P.to(dtype))

    @property
    def device(self) -> torch.device:
        """Return where the adapter lies."""
        return self.master_P.device

    def move(self, device: torch.device) -> None:
        """Take every buffer to a device, bit for bit; the working copy is made anew where it is of use.

        All of them or, where the device has no room, none.
        """
        master_P = self.master_P.to(device)
        exp_avg_P = self.exp_avg_P.to(device)
        exp_avg_sq_P = self.exp_avg_sq_P.to(device)
        gradient_P = None if self.gradient_P is None else self.gradient_P.to(device)
        self._work_with(master_P if device.type == "cpu" else master_P.to(self._dtype))
        self.master_P, self.gradient_P = master_P, gradient_P
        self.exp_avg_P, self.exp_avg_sq_P = exp_avg_P, exp_avg_sq_P

    def _work_with(self, working_P: Tensor) -> None:
        self.working_P = working_P
        self.weights = LoraWeights(self.layout.own_views(working_P), self.spec.alpha / self.spec.rank)

    def initialize(self) -> None:
        """Set B to zero and A to the random numbers that `spec.seed` fixes on every device.

        Source: uniform in +-1/sqrt(D), which is kaiming_uniform_(a=sqrt(5)) as in
        huggingface/peft: src/peft/tuners/lora/layer.py -> LoraLayer.reset_lora_parameters.
        """
        generator = torch.Generator().manual_seed(self.spec.seed & (2**63 - 1))
        host_P = torch.zeros(self.layout.num_parameters)
        for pair in self.layout.views(host_P).values():
            bound = 1.0 / math.sqrt(pair.a.shape[1])
            pair.a.uniform_(-bound, bound, generator=generator)
        self.master_P.copy_(host_P)
        self.refresh()

    def refresh(self) -> None:
        """Bring the working copy up to date with the master weights."""
        if self.working_P is not self.master_P:
            self.working_P.copy_(self.master_P)

    def accumulate(self, gradient_P: Tensor) -> None:
        """Add one job's gradient; the first one since the last step is taken over as it is."""
        if self.gradient_P is None:
            self.gradient_P = gradient_P
        else:
            self.gradient_P.add_(gradient_P)

    def freeze(self) -> LoraWeights:
        """Return a copy of the working weights that later steps do not touch."""
        return LoraWeights(self.layout.own_views(self.working_P.clone()), self.weights.scaling)

    def export(self, *, optimizer: bool, gradients: bool) -> AdapterState:
        """Return a host copy; moments and accumulated gradient only where asked for."""
        moments = None
        if optimizer:
            moments = OptimizerState(exp_avg=_to_host(self.exp_avg_P), exp_avg_sq=_to_host(self.exp_avg_sq_P))
        gradient = _to_host(self.gradient_P) if gradients and self.gradient_P is not None else None
        return AdapterState(
            spec=self.spec,
            layout=self.layout,
            step=self.step,
            weights=_to_host(self.master_P),
            optimizer=moments,
            gradient=gradient,
        )

    def restore(self, state: AdapterState, *, optimizer: bool) -> None:
        """Take over a host copy; without `optimizer` the moments and the step count start afresh.

        After an error, a lack of memory too, the adapter is as before.

        Raises:
            CheckpointError: the state does not fit this adapter, or lacks the wanted moments.
        """
        check_fit(state, self.layout)
        if optimizer and state.optimizer is None:
            raise CheckpointError("the checkpoint holds weights only: no optimizer state to restore")
        gradient_P = None
        if optimizer and state.gradient is not None:
            gradient_P = state.gradient.to(self.master_P.device, copy=True)
        self.master_P.copy_(state.weights)
        self.refresh()
        self.gradient_P = gradient_P
        self.step = 0
        self.exp_avg_P.zero_()
        self.exp_avg_sq_P.zero_()
        if optimizer and state.optimizer is not None:
            self.step = state.step
            self.exp_avg_P.copy_(state.optimizer.exp_avg)
            self.exp_avg_sq_P.copy_(state.optimizer.exp_avg_sq)


def check_fit(state: AdapterState, layout: Layout) -> None:
    """Compare a state with the layout that the base model gives its spec.

    Raises:
        CheckpointError: rank, module names, module sizes or buffer lengths differ.
    """
    if state.layout.rank != layout.rank:
        raise CheckpointError(f"the checkpoint has rank {state.layout.rank}, the adapter has {layout.rank}")
    if state.layout.modules != layout.modules:
        theirs, ours = set(state.layout.modules), set(layout.modules)
        odd = sorted(theirs ^ ours)[:3] or "another module order"
        raise CheckpointError(f"the checkpoint and the adapter do not train the same modules: {odd}")
    buffers = [state.weights, state.gradient]
    if state.optimizer is not None:
        buffers += [state.optimizer.exp_avg, state.optimizer.exp_avg_sq]
    for buffer in buffers:
        if buffer is None:
            continue
        if buffer.shape != (layout.num_parameters,) or buffer.dtype != torch.float32:
            raise CheckpointError(
                f"a buffer is {buffer.dtype} {tuple(buffer.shape)}, not float32 ({layout.num_parameters},)"
            )


def _to_host(flat_P: Tensor) -> Tensor:
    return flat_P.detach().to("cpu", copy=True)
