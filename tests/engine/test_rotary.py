"""The rotary embedding in few kernels against that of transformers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as rotate_a_part
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as rotate_plainly

from gpuworker.engine import rotary

from .conftest import CONFIGS


def make_heads() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries and keys in the strides that attention layers give them, and angles."""
    generator = torch.Generator().manual_seed(3)
    query, key = (
        torch.randn(1, 7, heads, 16, generator=generator).transpose(1, 2).requires_grad_() for heads in (4, 2)
    )
    angles = torch.randn(1, 7, 8, generator=generator).repeat(1, 1, 2)
    return query, key, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_transformers(dtype: torch.dtype) -> None:
    found = []
    for rotate in (rotary.rotate, rotate_plainly):
        query, key, cos, sin = make_heads()
        outputs = rotate(query.to(dtype), key.to(dtype), cos.to(dtype), sin.to(dtype))
        sum((output.float() * (number + 1)).pow(2).sum() for number, output in enumerate(outputs)).backward()
        found.append([*outputs, query.grad, key.grad])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < (1e-6 if dtype == torch.float32 else 0.01)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("size", [20, 64])
def test_a_row_turns_alike_beside_any_others(
    size: int, num_threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(num_threads)
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(1, 2011, heads, size, generator=generator).transpose(1, 2) for heads in (5, 1))
    angles = torch.randn(1, 2011, size // 2, generator=generator).repeat(1, 1, 2)
    whole = rotary.rotate(query, key, angles.cos(), angles.sin())
    for rows in (slice(0, 16), slice(701, 1340)):
        alone = (part.contiguous() for part in (query[:, :, rows], key[:, :, rows], angles[:, rows]))
        own_query, own_key, own_angles = alone
        turned = rotary.rotate(own_query, own_key, own_angles.cos(), own_angles.sin())
        for one, other in zip(turned, whole, strict=True):
            assert torch.equal(one, other[:, :, rows])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_computes_the_same_with_it(
    architecture: str, model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model_directory(architecture))
    fused = deepcopy(plain)
    rotary.fuse(fused)
    tokens = torch.arange(1, 20)[None]
    turned = []
    turn = rotary._turn

    def turn_and_note(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        turned.append(heads)
        return turn(heads, cos, sin, sign)

    monkeypatch.setattr(rotary, "_turn", turn_and_note)
    torch.testing.assert_close(fused(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    assert len(turned) == 2 * plain.config.num_hidden_layers  # not in the plain model


def test_a_rotation_of_another_kind_is_left_alone() -> None:
    assert rotary._is_plain(rotate_plainly)
    assert not rotary._is_plain(rotate_interleaved)
    assert not rotary._is_plain(rotate_a_part)
    assert not rotary._is_plain(None)
