"""The compute engine: one frozen base model, many adapters, training cycles and sampling.

Tensors and token ids only; no rows, queues or settings. The worker calls it from one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from gpuworker.engine import base_model, optimizer
from gpuworker.engine.adapters import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    UNEMBED,
    Adapter,
    AdapterState,
    Layout,
    LoraWeights,
    check_fit,
    held_bytes,
    select_modules,
)
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.device_names import device_name
from gpuworker.engine.exceptions import (
    CheckpointError,
    EngineError,
    LoraSpecError,
    OutOfMemory,
)
from gpuworker.engine.logprobs import Head
from gpuworker.engine.memory import (
    Made,
    available_bytes,
    free_bytes,
    free_cache,
    keep_freed,
    total_bytes,
    with_room,
)
from gpuworker.engine.residency import AdapterMemory, Residency
from gpuworker.engine.sampling import Sampler
from gpuworker.engine.tensor_parallel import ALONE, ProcessGroup
from gpuworker.engine.train_graphs import TrainGraphs
from gpuworker.engine.training import Trainer
from gpuworker.engine.types import (
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    OptimStepResult,
)

_MAX_RANK = 256
_GIB = 1 << 30
_AUTOMATIC = AdapterMemory()


class Engine:
    """Adapters on one base model. Results on a CPU do not depend on which jobs run together.

    `num_slots` is how many sequences are drawn together.
    """

    def __init__(self, base: BaseModel, *, adapter_memory: AdapterMemory) -> None:
        on_gpu = base.device.type == "cuda"
        self._base = base
        self._adapter_memory = adapter_memory.resolved(base.device).agreed(base.group.least)
        self._adapters = Residency(base.device, device_bytes=self._adapter_memory.device_bytes)
        self._sampler_bytes: OrderedDict[str, int] = OrderedDict()
        head = Head(base.head_weight, softcap=base.logit_softcap, chunk_rows=2048 if on_gpu else 512)
        self.num_slots = 256 if on_gpu else 64
        self._token_budget = _token_budget(base)
        self._head = head
        self._trainer = Trainer(base, head, token_budget=self._token_budget, graphs=_train_graphs(base))
        self.sampler = Sampler(
            base,
            head,
            max_slots=self.num_slots,
            prompt_budget=16384 if on_gpu else 2048,
            cache_bytes=base.group.least(
                free_bytes(base.device) // 3 if on_gpu else min(4 * _GIB, available_bytes() // 4)
            ),
            grouped=on_gpu,
        )

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        device: str,
        dtype: str,
        adapter_memory: AdapterMemory = _AUTOMATIC,
        group: ProcessGroup = ALONE,
    ) -> Engine:
        """Load a base model directory; see `base_model.load`.

        Raises:
            BaseModelError: the directory holds no model that the engine can run.
        """
        base = base_model.load(directory, device=device, dtype=dtype, group=group)
        keep_freed(base.device)
        return cls(base, adapter_memory=adapter_memory)

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the output projection."""
        return self._base.vocab_size

    @property
    def max_context(self) -> int:
        """Return the most tokens of one sequence."""
        return self._base.max_context

    @property
    def max_rank(self) -> int:
        """Return the largest LoRA rank worth its memory: no more than the hidden size."""
        return min(_MAX_RANK, int(self._base.config.hidden_size))

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Return the tokens that end a sequence unless a request says otherwise."""
        return self._base.end_tokens

    @property
    def num_parameters(self) -> int:
        """Return the number of frozen parameters."""
        return self._base.num_parameters

    @property
    def architecture(self) -> str:
        """Return the base model's class as its config names it."""
        return str((self._base.config.architectures or [self._base.config.model_type])[0])

    @property
    def precision(self) -> str:
        """Return the dtype of the frozen weights and why it was chosen, as one sentence."""
        return self._base.precision

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Return what must be the same for a replay to give the same bits."""
        return {
            "torch": torch.__version__,
            "device": str(self._base.device),
            "device_name": device_name(self._base.device),
            "num_devices": str(self._base.group.share.size),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "threads": str(torch.get_num_threads()),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }

    @property
    def memory_bytes(self) -> int:
        """Return the memory of the device, or of this machine as far as this process may use it."""
        return total_bytes(self._base.device)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Return what training takes of one device: bytes of weights, of a token's activations, of a piece of logits.

        The widths are adapter parameters for each unit of rank.
        """
        itemsize = self._base.dtype.itemsize
        return {
            "weight_bytes": self._base.num_weight_bytes,
            "attn_width": self._width(ATTENTION_PROJECTIONS),
            "mlp_width": self._width(MLP_PROJECTIONS),
            "unembed_width": self._width((UNEMBED,)),
            "working_bytes": 0 if self._base.dtype == torch.float32 else itemsize,
            "row_bytes": _row_bytes(self._base),
            "batch_rows": self._token_budget,
            "head_bytes": self._head.chunk_rows * self.vocab_size * 3 * torch.float32.itemsize,
        }

    def create_adapter(self, adapter_id: str, spec: LoraSpec) -> None:
        """Hold a new adapter: B zero, A random from `spec.seed`. An adapter of this id is replaced.

        Raises:
            LoraSpecError: the base model cannot carry such an adapter.
            OutOfMemory: it has no room on the device; one of this id that was held is as before.
        """
        self._adapters.put(adapter_id, self._with_room(partial(self._initialized, spec), "the adapter"))

    def has_adapter(self, adapter_id: str) -> bool:
        """Return whether the adapter is held."""
        return adapter_id in self._adapters

    def drop_adapter(self, adapter_id: str) -> None:
        """Forget an adapter and free its memory; unknown ids are fine."""
        self._adapters.drop(adapter_id)

    @property
    def adapter_room_bytes(self) -> int:
        """Return what adapters may take on the device and the host together, beside the samplers that are held."""
        return self._adapter_memory.total_bytes - sum(self._sampler_bytes.values())

    def adapter_bytes(self, spec: LoraSpec) -> int:
        """Return the memory that an adapter of this spec takes; 0 where the base model cannot carry it."""
        try:
            layout = self._select_modules(spec)
        except LoraSpecError:
            return 0
        return held_bytes(layout, self._base.dtype)

    def watch(self, on_batch: Callable[[], None]) -> None:
        """Have a function called after each batch of a `forward_backward`, as a sign that it gets on."""
        self._trainer.on_batch = on_batch

    def forward_backward(self, jobs: Sequence[ForwardBackward]) -> list[ForwardBackwardResult | EngineError]:
        """Run jobs of many adapters through the model together; one outcome per job, in order.

        Gradients add up in the adapters in job order until `optim_step`. A job that fails leaves
        its adapter's gradient as it was and does not touch the others.
        """
        outcomes: list[ForwardBackwardResult | EngineError] = []
        for part in self._adapters.fitting([job.adapter_id for job in jobs]):
            refused = self._bring([job.adapter_id for job in jobs[part]])
            outcomes += self._trainer.run(jobs[part], partial(self._present, refused))
        return outcomes

    def optim_step(self, steps: Sequence[OptimStep]) -> list[OptimStepResult | EngineError]:
        """Apply and clear the accumulated gradients; one outcome per step, in order."""
        outcomes: list[OptimStepResult | EngineError] = []
        for part in self._adapters.fitting([step.adapter_id for step in steps]):
            refused = self._bring([step.adapter_id for step in steps[part]])
            outcomes += optimizer.run(steps[part], partial(self._present, refused), free=self._free)
        return outcomes

    def export_state(self, adapter_id: str, *, optimizer: bool, gradients: bool) -> AdapterState:
        """Return a host copy of an adapter.

        Raises:
            AdapterNotLoaded: the adapter is not held.
            GroupDiffers: another process of the group has come to other weights.
        """
        adapter = self._adapters.get(adapter_id)
        self._base.group.check_same(
            [adapter.master_P, adapter.exp_avg_P, adapter.exp_avg_sq_P, adapter.gradient_P]
        )
        return adapter.export(optimizer=optimizer, gradients=gradients)

    def import_state(self, adapter_id: str, state: AdapterState, *, optimizer: bool) -> None:
        """Put a state into an adapter, or into a new one of the state's spec if it is not held.

        Without `optimizer` moments and step count start afresh and no gradient is kept. After an
        error the adapter is as before.

        Raises:
            CheckpointError: the state fits neither the adapter nor the base model.
            OutOfMemory: it has no room on the device.
        """
        if adapter_id in self._adapters:
            held = self._adapters.get(adapter_id)
            self._with_room(partial(held.restore, state, optimizer=optimizer), "the state")
            return
        made = self._with_room(partial(self._restored, state, optimizer=optimizer), "the adapter")
        self._adapters.put(adapter_id, made)

    def keep_sampler(self, sampler_id: str, adapter_id: str) -> None:
        """Keep a copy of an adapter's present weights for sampling.

        Raises:
            AdapterNotLoaded: the adapter is not held.
            OutOfMemory: it has no room on the device.
        """
        adapter = self._present(self._bring([adapter_id]), adapter_id)
        weights = self._with_room(adapter.freeze, "the sampler's weights")
        self._hold_sampler(sampler_id, weights, adapter.layout)

    def load_sampler(self, sampler_id: str, state: AdapterState) -> None:
        """Hold the weights of a state for sampling.

        Raises:
            CheckpointError: the state does not fit the base model.
            OutOfMemory: it has no room on the device.
        """
        layout = self._layout_of(state)
        copy = partial(state.weights.to, device=self._base.device, dtype=self._base.dtype, copy=True)
        flat_P = self._with_room(copy, "the sampler's weights")
        weights = LoraWeights(layout.own_views(flat_P), state.spec.alpha / state.spec.rank)
        self._hold_sampler(sampler_id, weights, layout)

    def has_sampler(self, sampler_id: str) -> bool:
        """Return whether the sampler is held."""
        return sampler_id in self.sampler.weights

    def use_sampler(self, sampler_id: str) -> bool:
        """Count a sampler as used now; false when it is not held and must be loaded."""
        if sampler_id in self._sampler_bytes:
            self._sampler_bytes.move_to_end(sampler_id)
        return self.has_sampler(sampler_id)

    def drop_sampler(self, sampler_id: str) -> None:
        """Forget a sampler; requests already submitted finish with it."""
        self.sampler.weights.drop(sampler_id)
        self._sampler_bytes.pop(sampler_id, None)
        self._adapters.reserved_bytes = sum(self._sampler_bytes.values())

    def _bring(self, adapter_ids: Collection[str]) -> Mapping[str, OutOfMemory]:
        """Have adapters on the device, in the place of what is kept for later if need be; returns who stays away."""
        if not self._adapters.bring(adapter_ids):
            return {}
        self._free()
        return self._adapters.bring(adapter_ids)

    def _free(self) -> None:
        """Give back what training, sampling and torch keep for later."""
        self._trainer.release_unused()
        self.sampler.release_unused()
        free_cache(self._base.device)

    def _with_room(self, action: Callable[[], Made], what: str) -> Made:
        return with_room(action, free=self._free, what=what)

    def _present(self, refused: Mapping[str, OutOfMemory], adapter_id: str) -> Adapter:
        if adapter_id in refused:
            raise refused[adapter_id]
        return self._adapters.get(adapter_id)

    def _hold_sampler(self, sampler_id: str, weights: LoraWeights, layout: Layout) -> None:
        """Hold sampler weights; those used longest ago go when all take more than a quarter of the device's room."""
        self.sampler.weights.hold(sampler_id, weights)
        self._sampler_bytes[sampler_id] = layout.num_parameters * self._base.dtype.itemsize
        self._sampler_bytes.move_to_end(sampler_id)
        limit = self._adapter_memory.device_bytes // 4
        while len(self._sampler_bytes) > 1 and sum(self._sampler_bytes.values()) > limit:
            self.drop_sampler(next(iter(self._sampler_bytes)))
        self._adapters.reserved_bytes = sum(self._sampler_bytes.values())

    def _width(self, projections: Sequence[str]) -> int:
        chosen = [module for module in self._base.modules if module.projection in projections]
        return sum(module.in_features + module.out_features for module in chosen)

    def _initialized(self, spec: LoraSpec) -> Adapter:
        adapter = self._new_adapter(spec)
        adapter.initialize()
        return adapter

    def _restored(self, state: AdapterState, *, optimizer: bool) -> Adapter:
        adapter = self._new_adapter(state.spec, checked=state)
        adapter.restore(state, optimizer=optimizer)
        return adapter

    def _new_adapter(self, spec: LoraSpec, *, checked: AdapterState | None = None) -> Adapter:
        layout = self._select_modules(spec) if checked is None else self._layout_of(checked)
        self._adapters.make_room(held_bytes(layout, self._base.dtype))
        return Adapter(spec, layout, device=self._base.device, dtype=self._base.dtype)

    def _select_modules(self, spec: LoraSpec) -> Layout:
        base = self._base
        return select_modules(spec, base.modules, max_rank=self.max_rank, share=base.group.share)

    def _layout_of(self, state: AdapterState) -> Layout:
        """Return the layout of a state on this base model, or raise CheckpointError."""
        try:
            layout = self._select_modules(state.spec)
        except LoraSpecError as error:
            raise CheckpointError(f"the checkpoint does not suit this base model: {error}") from error
        check_fit(state, layout)
        return layout


def _token_budget(base: BaseModel) -> int:
    """Return the rows of one training batch: 2048 fill a CPU, a GPU takes what half its memory holds.

    Fixed at load, because the cut of a job decides its last bits.
    """
    if base.device.type != "cuda":
        return 2048
    fitting = max(1, base.group.least(free_bytes(base.device)) // 2 // _row_bytes(base))
    return min(16384, max(1024, 1 << (fitting.bit_length() - 1)))


def _train_graphs(base: BaseModel) -> TrainGraphs | None:
    """Return recorded passes where the device has the kernels they need: CUDA has them in bfloat16."""
    if base.device.type != "cuda" or base.dtype != torch.bfloat16 or base.has_softcapped_attention:
        return None
    if not base.group.is_alone:  # sums over a group are not recorded
        return None
    return TrainGraphs(base, row_bytes=_row_bytes(base), max_bytes=free_bytes(base.device) // 6)


def _row_bytes(base: BaseModel) -> int:
    """Return about what autograd keeps for one row: 12 hidden and 4 intermediate vectors a layer."""
    config = base.config
    widths = 12 * config.hidden_size + 4 * config.intermediate_size
    return int(config.num_hidden_layers * widths * base.dtype.itemsize)
