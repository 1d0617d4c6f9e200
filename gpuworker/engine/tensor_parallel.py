"""One base model over the processes of a group: who holds what of it, and how they add up what each computed.

The layers of one input (q, k, v; gate, up) are split by output features, those behind them (o, down) by input
features. So a layer pair needs two sums over the group: of o's and down's outputs on the way forward, of the
gradient of the shared input on the way back. Embeddings, norms and head are whole everywhere, and so are adapters:
each process multiplies with its part of their factors and fills that part of a job's gradient, which is summed once
when the job is done. All processes then take the same steps on the same numbers.

`gpuworker.group` starts the processes. They meet in a file and speak over the loopback interface; only numbers of
tensors go that way, nothing that is unpickled.
Source: Shoeybi et al. 2019, section 3 (Megatron-LM); the plans are those of transformers' model configurations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]

from gpuworker.engine.adapters import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    ROWWISE_PROJECTIONS,
    UNEMBED,
    WHOLE,
    Layout,
    Share,
)
from gpuworker.engine.exceptions import BaseModelError
from gpuworker.engine.lora import RoutedLinear
from gpuworker.engine.products import FrozenWeight

_LOOPBACK: Final = "lo"
_DIVIDED_SETTINGS: Final = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
_WHOLE_MODULES: Final = {"model.embed_tokens": "replicate", "lm_head": "replicate"}
"""Split they would save memory of two matrices, and cost a sum in every pass and another form of the head."""


class GroupDiffers(RuntimeError):
    """Processes of one group hold different adapters: nothing that they compute can be trusted."""


class ProcessGroup:
    """The processes that compute one base model together; alone, every method returns at once.

    All must call the same methods in the same order.
    """

    def __init__(self, share: Share = WHOLE) -> None:
        self.share = share
        self.is_alone = share.size == 1

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, which is the same bits in each, and return it.

        On a CPU the parts are added in the order of the processes: the sum of a number then does not depend on
        its place in the tensor, so on what is computed beside it.
        """
        if self.is_alone:
            return tensor
        if tensor.is_cuda:
            dist.all_reduce(tensor)
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.share.size)]
        dist.all_gather(parts, tensor)
        first, *others = parts
        tensor.copy_(first)
        for part in others:
            tensor += part
        return tensor

    def add_up_gradient(self, layout: Layout, gradient_P: Tensor | None) -> None:
        """Turn the parts of one job's gradient into the whole in every process; the head's is whole in the first."""
        if self.is_alone or gradient_P is None:
            return
        if self.share.position > 0:
            for name, pair in layout.views(gradient_P).items():
                if name == UNEMBED:
                    pair.a.zero_()
                    pair.b.zero_()
        self.add_up(gradient_P)

    def least(self, number: int) -> int:
        """Return the smallest of the numbers that the processes give."""
        if self.is_alone:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers)

    def most(self, number: int) -> int:
        """Return the largest of the numbers that the processes give."""
        return -self.least(-number)

    def agree(self, tokens: list[int], logprobs: list[float]) -> tuple[list[int], list[float]]:
        """Return what the first process chose: a last bit that differs must not let sequences part."""
        if self.is_alone:
            return tokens, logprobs
        chosen = torch.tensor([tokens, logprobs], dtype=torch.float64)
        dist.broadcast(chosen, src=0)
        agreed_tokens, agreed_logprobs = chosen.tolist()
        return [int(token) for token in agreed_tokens], agreed_logprobs

    def check_same(self, tensors: Sequence[Tensor | None]) -> None:
        """Compare float32 tensors, where there are any, bit by bit, by a checksum.

        Raises:
            GroupDiffers: another process has other bits.
        """
        if self.is_alone:
            return
        sums = [0 if one is None else int(one.view(torch.int32).sum(dtype=torch.int64)) for one in tensors]
        if [self.least(one) for one in sums] != [self.most(one) for one in sums]:
            raise GroupDiffers("the processes of the group hold different adapters")

    def leave(self) -> None:
        """End the connections."""
        if not self.is_alone:
            dist.destroy_process_group()


ALONE: Final = ProcessGroup()


def join(share: Share, meeting: Path, *, device: str, timeout_s: float) -> ProcessGroup:
    """Return the group once all its processes have come.

    Args:
        meeting: a file in a folder that only its owner can enter; it stays as long as the group.
        timeout_s: how long one process waits for the others, now and in every sum.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _LOOPBACK
    target = torch.device(device)
    backend = "gloo"
    if target.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        os.environ["LOCAL_RANK"] = str(target.index or 0)  # by which transformers finds the device
        torch.cuda.set_device(target)
    dist.init_process_group(
        backend,
        store=FileStore(str(meeting), share.size),
        rank=share.position,
        world_size=share.size,
        timeout=timedelta(seconds=timeout_s),
    )
    return ProcessGroup(share)


def check_config(config: Any, share: Share, name: str, *, device: torch.device) -> None:
    """Check that a model can be split among so many processes.

    Raises:
        BaseModelError: a number of heads or features cannot be divided, transformers has no such plan, or it
            would put the parts elsewhere.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type != device.type:
        raise BaseModelError(
            f"this build of torch splits models over {accelerator.type} devices only, not over {device.type}"
        )
    numbers = {setting: getattr(config, setting, None) for setting in _DIVIDED_SETTINGS}
    divided = {setting: value for setting, value in numbers.items() if isinstance(value, int)}
    for setting, value in divided.items():
        if value % share.size:
            common = math.gcd(*divided.values())
            fitting = [str(count) for count in range(1, common + 1) if common % count == 0]
            raise BaseModelError(
                f"{setting} {value} of {name} cannot be divided among {share.size} devices, "
                f"only among {', '.join(fitting)}"
            )
    plan = {
        module.rpartition(".")[2]: style
        for module, style in (getattr(config, "base_model_tp_plan", None) or {}).items()
    }
    for projection in (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS):
        wanted = "rowwise" if projection in ROWWISE_PROJECTIONS else "colwise"
        if plan.get(projection) != wanted:
            raise BaseModelError(
                f"the tensor-parallel plan of {name} splits {projection} as {plan.get(projection)}, not {wanted}"
            )


def reading_options(share: Share) -> Mapping[str, Any]:
    """Return what `from_pretrained` takes to read this process's part of the weights only."""
    if share.size == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=share.size, tp_plan=_WHOLE_MODULES)}


def keep_share(layers: Sequence[RoutedLinear], group: ProcessGroup) -> None:
    """Let routed layers, read with `reading_options`, compute with this process's part, and add up what needs it."""
    if group.is_alone:
        return
    from torch.distributed.tensor import (
        DTensor,
    )  # its import takes a while, and one process alone has no use for it

    for layer in layers:
        is_rowwise = layer.name.rpartition(".")[2] in ROWWISE_PROJECTIONS
        for name, parameter in list(layer.named_parameters()):
            held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            # Of the outputs that are added up only one may have the bias.
            is_left_out = name == "bias" and is_rowwise and group.share.position > 0
            kept = None if is_left_out else nn.Parameter(held.detach().contiguous(), requires_grad=False)
            setattr(layer, name, kept)
        layer.frozen = FrozenWeight(layer.weight)
        if is_rowwise:
            layer.add_up_output = group.add_up
        else:
            layer.add_up_input_gradient = group.add_up
