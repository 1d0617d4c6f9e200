"""Adapters side by side while decoding: every sequence as it is alone, bit for bit, in whatever company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpuworker.engine import decode_stack
from gpuworker.engine.adapters import Layout, LoraWeights, ModuleShape
from gpuworker.engine.decode_stack import DecodeStacks, is_exact
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import LoraSpec, SampleRequest, SampleResult, SamplingParams
from tests.engine.reference import make_adapter

PARAMS = SamplingParams(max_tokens=6, seed=3, temperature=1.0, stop_tokens=())


def weights(rank: int, *, scaling: float = 2.0, num_inputs: int = 24, names: str = "xy") -> LoraWeights:
    layout = Layout(rank, tuple(ModuleShape(name, num_inputs, 40) for name in names))
    return LoraWeights(layout.views(torch.randn(layout.num_parameters)), scaling)


def request(name: str, length: int) -> SampleRequest:
    prompt = np.random.default_rng(length).integers(0, 60, length)
    return SampleRequest(request_id=name, sampler_id=name, prompt=prompt, params=replace(PARAMS, seed=length))


def drawn(engine: Engine, requests: list[SampleRequest]) -> dict[str, SampleResult]:
    for one in requests:
        engine.sampler.submit(one)
    found: dict[str, SampleResult] = {}
    while engine.sampler.num_pending:
        for name, outcome in engine.sampler.step():
            assert isinstance(outcome, SampleResult)
            found[name] = outcome
    return found


@pytest.fixture
def engine(load_engine: Callable[..., Engine]) -> Engine:
    engine = load_engine("qwen3")
    ranks = {"a": 4, "b": 4, "c": 6, "d": 4}
    for seed, (name, rank) in enumerate(ranks.items()):
        make_adapter(engine, name, LoraSpec(rank=rank, seed=seed, train_mlp=name != "d"))
        engine.keep_sampler(name, name)
    return engine


def test_a_sequence_has_the_bits_it_has_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(name, 5 + number) for number, name in enumerate("abcd")]
    alone = {one.request_id: drawn(engine, [one])[one.request_id] for one in requests}
    stacked: list[int] = []
    find = DecodeStacks.find

    def noted(stacks: DecodeStacks, held: Sequence[LoraWeights]) -> decode_stack.Stack | None:
        stacked.append(len(held))
        return find(stacks, held)

    monkeypatch.setattr(DecodeStacks, "find", noted)
    together = drawn(engine, requests)
    assert set(stacked) == {2}
    for name, expected in alone.items():
        (actual,), (other,) = together[name].sequences, expected.sequences
        np.testing.assert_array_equal(actual.tokens, other.tokens)
        np.testing.assert_array_equal(actual.logprobs, other.logprobs)


def test_a_stack_gives_each_adapter_its_own_products() -> None:
    held = [weights(3), weights(3, scaling=0.5)]
    stack = DecodeStacks().find(held)
    assert stack is not None
    rows_TD = torch.randn(8, 24)
    output_TF = torch.zeros(8, 40)
    rows = decode_stack.StackedRows(stack, 1, [2, 5], row_step=4)
    rows.add(output_TF, rows_TD, "x")
    rows.add(output_TF, rows_TD, "no such module")
    for part, one in ((slice(1, 3), held[0]), (slice(3, 8), held[1])):
        expected = rows_TD[part] @ one.pairs["x"].a.t() @ one.pairs["x"].b.t() * one.scaling
        torch.testing.assert_close(output_TF[part], expected)
    assert output_TF[0].eq(0).all()


def test_a_broken_adapter_does_not_reach_its_neighbour() -> None:
    well, sick = weights(3), weights(3)
    for pair in sick.pairs.values():
        pair.a.fill_(torch.nan)
    stack = DecodeStacks().find([well, sick])
    assert stack is not None
    output_TF = torch.zeros(8, 40)
    decode_stack.StackedRows(stack, 0, [4, 4], row_step=4).add(output_TF, torch.randn(8, 24), "y")
    assert output_TF[:4].isfinite().all()
    assert output_TF[4:].isnan().all()


def test_stacks_keep_to_their_memory_and_to_shapes_that_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks, held = DecodeStacks(), [weights(3) for _ in range(4)]
    one_pair = sum(factor.numel() * 4 for pair in held[0].pairs.values() for factor in pair)
    monkeypatch.setattr(decode_stack, "_MAX_BYTES", 2 * one_pair)
    first = stacks.find(held[:2])
    assert stacks.find(held[:2]) is first
    assert stacks.find(held[:3]) is None
    assert stacks.find(held[2:]) is not None
    assert stacks.find(held[:2]) is not first
    stacks.inexact.add(held[0].pairs["x"].a.shape)
    assert stacks.find(held[1:3]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_machine_is_tried_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_exact(torch.empty(16, 512, dtype=dtype))
    batched = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *inputs: batched(*inputs) * 1.01)
    assert not is_exact(torch.empty(16, 512, dtype=dtype))
