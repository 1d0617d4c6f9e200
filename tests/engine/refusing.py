"""A device that runs out of memory when a test says so."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Refusing(TorchDispatchMode):
    """After so many calls that make zeros the allocator really refuses further ones, up to a number."""

    def __init__(self, *, num_allowed: int, max_refused: int = 1000) -> None:
        super().__init__()
        self._num_allowed = num_allowed
        self._max_refused = max_refused
        self.num_refused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("zeros", "new_zeros") and self.num_refused < self._max_refused:
            self._num_allowed -= 1
            if self._num_allowed < 0:
                self.num_refused += 1
                torch.empty(2**50)
        return func(*args, **(kwargs or {}))
