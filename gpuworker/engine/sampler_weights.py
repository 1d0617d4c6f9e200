"""The weights that samples are drawn with, by id."""

from __future__ import annotations

import torch
from torch import Tensor

from gpuworker.engine.adapters import LoraWeights
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.decode_stack import DecodeStacks, is_exact
from gpuworker.engine.exceptions import AdapterNotLoaded
from gpuworker.engine.lora_decode import find_factor_step


class SamplerWeights:
    """Held weights, and what a batch of any of them needs to have the bits that each has alone.

    Batches have a multiple of `row_step` rows; on a CPU `stacks` join factors of one shape.
    """

    def __init__(self, base: BaseModel) -> None:
        self.row_step = base.row_step
        self.stacks = DecodeStacks() if base.device.type == "cpu" else None
        self._group = base.group
        self._held: dict[str, tuple[int, LoraWeights]] = {}
        self._num_held = 0
        self._probed: set[torch.Size] = set()

    def hold(self, sampler_id: str, weights: LoraWeights) -> None:
        """Make weights known under an id; requests already submitted keep the weights they have."""
        self._num_held += 1
        self._held[sampler_id] = self._num_held, weights
        factors = {factor.shape: factor for pair in weights.pairs.values() for factor in pair}
        unknown = [factor for shape, factor in factors.items() if shape not in self._probed]
        self._probed.update(factors)
        self.row_step = max(self.row_step, self._group.most(find_factor_step(unknown)))
        if self.stacks is not None:
            self.stacks.inexact.update(factor.shape for factor in unknown if not self._is_exact(factor))

    def __contains__(self, sampler_id: str) -> bool:
        return sampler_id in self._held

    def get(self, sampler_id: str) -> tuple[int, LoraWeights]:
        """Return a number that the weights have to themselves, and the weights.

        Raises:
            AdapterNotLoaded: the id is unknown.
        """
        if sampler_id not in self._held:
            raise AdapterNotLoaded(f"sampler {sampler_id} is not loaded")
        return self._held[sampler_id]

    def drop(self, sampler_id: str) -> None:
        """Forget an id; requests already submitted finish with its weights."""
        self._held.pop(sampler_id, None)

    def release_unused(self) -> None:
        """Give back what is kept for later batches."""
        if self.stacks is not None:
            self.stacks.clear()

    def _is_exact(self, factor: Tensor) -> bool:
        return bool(self._group.least(int(is_exact(factor))))
