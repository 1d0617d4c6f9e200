"""Grouped products against those of one segment after another; the CPU has them in float32, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpuworker.engine.adapters import Adapter, ModuleShape, select_modules
from gpuworker.engine.lora import Products, Segment
from gpuworker.engine.lora_stack import AdapterRows, Stack, combine
from gpuworker.engine.types import LoraSpec

MODULES = (ModuleShape("up_proj", 24, 40), ModuleShape("down_proj", 40, 24))
LENGTHS = (3, 17, 1, 9)


def make_rows(*, trained: bool = True, first_row: int = 2) -> list[AdapterRows]:
    """Return rows of four adapters of rank 8, each with another alpha; two rows before and after are nobody's."""
    rows, start = [], first_row
    for number, length in enumerate(LENGTHS):
        spec = LoraSpec(rank=8, seed=number, alpha=8.0 + number)
        adapter = Adapter(
            spec,
            select_modules(spec, MODULES, max_rank=8),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        adapter.master_P.copy_(torch.randn(len(adapter.master_P)))
        gradient_P = torch.zeros_like(adapter.master_P) if trained else None
        gradients = None if gradient_P is None else adapter.layout.views(gradient_P)
        segment = Segment(start, start + length, adapter.weights, gradients)
        rows.append(AdapterRows(segment, adapter, gradient_P))
        start += length
    return rows


def run(products: Sequence[Products], name: str, rows_TD: Tensor, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Return what all products add to a layer's output and to the gradient of its input."""
    output_TF, grad_rows_TD = torch.zeros_like(grad_TF), torch.zeros_like(rows_TD)
    for some in products:
        kept = some.add({name: output_TF}, rows_TD)
        some.backward({name: grad_TF}, kept, rows_TD=rows_TD, grad_rows_TD=grad_rows_TD)
        some.finish()
    return output_TF, grad_rows_TD


@pytest.mark.parametrize("module", MODULES)
def test_a_stack_adds_what_its_segments_add(module: ModuleShape) -> None:
    torch.manual_seed(0)
    rows = make_rows()
    rows_TD, grad_TF = torch.randn(34, module.in_features), torch.randn(34, module.out_features)
    expected = run([some.segment for some in rows], module.name, rows_TD, grad_TF)
    gradients = [some.gradient_P.clone() for some in rows if some.gradient_P is not None]
    for some in rows:
        assert some.gradient_P is not None
        some.gradient_P.zero_()
    actual = run([Stack(rows)], module.name, rows_TD, grad_TF)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours[:2].any()
        assert not ours[-2:].any()
    for some, gradient_P in zip(rows, gradients, strict=True):
        torch.testing.assert_close(some.gradient_P, gradient_P)


def test_two_blocks_of_one_job_add_up() -> None:
    torch.manual_seed(0)
    first, second, *_ = make_rows()
    again = first._replace(segment=second.segment._replace(gradients=first.segment.gradients))
    rows_TD, grad_TF = torch.randn(34, 24), torch.randn(34, 40)
    run([Stack([first, again])], "up_proj", rows_TD, grad_TF)
    stacked = first.gradient_P
    assert stacked is not None
    both = stacked.clone()
    stacked.zero_()
    again_alone = again.segment._replace(weights=first.adapter.weights)
    run([first.segment, again_alone], "up_proj", rows_TD, grad_TF)
    torch.testing.assert_close(both, stacked)


def test_a_forward_pass_keeps_no_gradient() -> None:
    torch.manual_seed(0)
    rows = make_rows(trained=False)
    stack = Stack(rows)
    assert not stack.is_trained
    rows_TD, grad_TF = torch.randn(34, 24), torch.randn(34, 40)
    expected, _ = run([some.segment for some in rows], "up_proj", rows_TD, grad_TF)
    torch.testing.assert_close(run([stack], "up_proj", rows_TD, grad_TF)[0], expected)


def test_segments_stay_alone_on_a_cpu() -> None:
    """There a row's bits may not depend on what is stacked beside it."""
    rows = make_rows()
    assert combine(rows) == [some.segment for some in rows]
