from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine import memory
from gpuworker.engine.adapters import Adapter, ModuleShape, held_bytes, select_modules
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import AdapterNotLoaded, OutOfMemory
from gpuworker.engine.residency import AdapterMemory, Residency
from gpuworker.engine.types import AdamParams, ForwardBackwardResult, LoraSpec, OptimStep, OptimStepResult

from .jobs import make_job

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEC = LoraSpec(rank=2, seed=5)
MODULES = (ModuleShape("layers.0.q_proj", 16, 24), ModuleShape("layers.0.up_proj", 16, 32))
LAYOUT = select_modules(SPEC, MODULES, max_rank=8)
BYTES = held_bytes(LAYOUT, torch.bfloat16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no second device to move to")


def adapter(*, device: torch.device = CPU, seed: int = 0) -> Adapter:
    """Return an adapter whose buffers are all different."""
    made = Adapter(SPEC, LAYOUT, device=device, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for buffer_P in (made.master_P, made.exp_avg_P, made.exp_avg_sq_P):
        buffer_P.copy_(torch.randn(LAYOUT.num_parameters, generator=generator))
    made.refresh()
    made.accumulate(torch.randn(LAYOUT.num_parameters, generator=generator).to(device))
    return made


def contents(one: Adapter) -> list[torch.Tensor]:
    state = one.export(optimizer=True, gradients=True)
    assert state.optimizer is not None
    assert state.gradient is not None
    return [state.weights, state.optimizer.exp_avg, state.optimizer.exp_avg_sq, state.gradient]


def test_the_memory_of_an_adapter_is_that_of_its_buffers() -> None:
    one = adapter()
    buffers = [one.master_P, one.exp_avg_P, one.exp_avg_sq_P, one.working_P, one.gradient_P]
    assert one.num_bytes == sum(buffer.nbytes for buffer in buffers if buffer is not None)


def test_an_adapter_that_rests_keeps_its_bits_and_no_working_copy() -> None:
    one, same = adapter(), adapter()
    one.move(CPU)
    assert all(torch.equal(*pair) for pair in zip(contents(one), contents(same), strict=True))
    assert one.working_P is one.master_P


def test_a_list_is_cut_where_the_device_is_full() -> None:
    residency = Residency(CUDA, device_bytes=2 * BYTES)
    for name in "abc":
        residency.put(name, adapter())

    def cut(ids: str) -> list[str]:
        return [ids[part] for part in residency.fitting(ids)]

    assert cut("abcabc") == ["ab", "ca", "bc"]
    assert cut("aaabbbc") == ["aaabbb", "c"]
    assert cut("") == []
    assert cut("axb") == ["axb"]  # an unknown one takes no room
    residency.reserved_bytes = BYTES
    assert cut("aab") == ["aa", "b"]
    residency.reserved_bytes = 2 * BYTES
    assert cut("ab") == ["a", "b"]  # one alone always goes


def test_where_device_and_host_are_one_nothing_is_cut_or_moved() -> None:
    residency = Residency(CPU, device_bytes=BYTES)
    for name in "abc":
        residency.put(name, adapter())
    working = residency.get("a").working_P
    assert list(residency.fitting("abc")) == [slice(0, 3)]
    residency.bring("bc")
    assert residency.get("a").working_P is working


class _Homeless(Adapter):
    """An adapter that no device has room for: the allocator really refuses."""

    num_tries = 0

    def move(self, device: torch.device) -> None:
        self.num_tries += 1
        torch.empty(2**50)


class _Distant(Adapter):
    """An adapter on a device that nothing can be copied from."""

    def move(self, device: torch.device) -> None:
        self.master_P = torch.zeros(self.layout.num_parameters, device=device)


class _Refused(torch.Tensor):
    """A buffer that finds no room where it should go."""

    def to(self, *_: object) -> torch.Tensor:  # type: ignore[override]
        return torch.empty(2**50)


@pytest.mark.parametrize("buffer", ["exp_avg_P", "exp_avg_sq_P", "gradient_P"])
def test_an_adapter_that_finds_no_room_half_way_stays_whole(buffer: str) -> None:
    one = adapter()
    working = one.working_P
    setattr(one, buffer, getattr(one, buffer).as_subclass(_Refused))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        one.move(torch.device("meta"))
    assert {held.device.type for held in (one.master_P, one.exp_avg_P, one.exp_avg_sq_P)} == {"cpu"}
    assert one.working_P is working


def test_those_behind_one_without_room_are_brought() -> None:
    residency = Residency(CPU, device_bytes=BYTES)
    residency.put("away", _Homeless(SPEC, LAYOUT, device=torch.device("meta"), dtype=torch.float32))
    residency.put("behind", _Distant(SPEC, LAYOUT, device=torch.device("meta"), dtype=torch.float32))
    assert list(residency.bring(["away", "behind"])) == ["away"]
    assert residency.get("behind").device == CPU


def test_an_adapter_without_room_fails_alone(model_directory: Callable[[str], Path]) -> None:
    engine = Engine.load(model_directory("qwen3"), device="cpu", dtype="float32")
    engine.create_adapter("here", SPEC)
    layout = engine._adapters.get("here").layout
    away = _Homeless(SPEC, layout, device=torch.device("meta"), dtype=torch.float32)
    engine._adapters.put("away", away)
    jobs = [make_job(name, np.random.default_rng(1), [5]) for name in ("here", "away")]

    trained, refused = engine.forward_backward(jobs)
    assert isinstance(trained, ForwardBackwardResult)
    assert isinstance(refused, OutOfMemory)
    assert away.num_tries == 2  # once more when what sampling keeps for later has made room
    steps = [OptimStep(adapter_id=name, params=AdamParams(learning_rate=1e-3)) for name in ("away", "here")]
    refused_step, stepped = engine.optim_step(steps)
    assert isinstance(refused_step, OutOfMemory)
    assert isinstance(stepped, OptimStepResult)
    with pytest.raises(OutOfMemory, match="no room for the adapter"):
        engine.keep_sampler("sampler", "away")


def test_dropped_and_unknown_adapters_are_not_loaded() -> None:
    residency = Residency(CPU, device_bytes=BYTES)
    residency.put("a", adapter())
    residency.drop("a")
    residency.drop("a")
    assert "a" not in residency
    with pytest.raises(AdapterNotLoaded, match="adapter a is not loaded"):
        residency.get("a")


@needs_gpu
def test_the_least_recently_used_rest_on_the_host_and_come_back_bit_for_bit() -> None:
    residency = Residency(CUDA, device_bytes=2 * BYTES)
    expected = {name: contents(adapter(seed=seed)) for seed, name in enumerate("abcd")}
    for seed, name in enumerate("abcd"):
        residency.make_room(BYTES)
        residency.put(name, adapter(device=CUDA, seed=seed))

    def here() -> str:
        return "".join(name for name in "abcd" if residency.get(name).device.type == "cuda")

    assert here() == "cd"
    residency.bring(["c", "a"])
    assert here() == "ac"
    residency.bring(["b"])
    assert here() == "ab"
    residency.bring(["c", "d", "b"])  # what the present pass uses stays, even beyond the room
    assert here() == "bcd"
    for name, buffers in expected.items():
        assert all(torch.equal(*pair) for pair in zip(contents(residency.get(name)), buffers, strict=True))
        residency.bring([name])
        one = residency.get(name)
        assert torch.equal(one.working_P, one.master_P.to(torch.bfloat16))


def test_zero_stands_for_a_part_of_what_is_free() -> None:
    available = memory.available_bytes()
    assert 0 < available <= memory.total_bytes(CPU)
    both = AdapterMemory(num_engines=2, num_workers=2).resolved(CPU)
    assert 0 < both.device_bytes <= available // 4
    assert both.host_bytes == 0
    assert AdapterMemory(device_bytes=7).resolved(CPU).total_bytes == 7


def test_a_container_leaves_what_its_limit_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit, use = tmp_path / "max", tmp_path / "current"
    limit.write_text("5000000\n")
    use.write_text("2000000\n")
    monkeypatch.setattr(memory, "_CONTAINER_LIMIT", limit)
    monkeypatch.setattr(memory, "_CONTAINER_USE", use)
    parts = tmp_path / "stat"
    parts.write_text("anon 1200000\nfile 800000\ninactive_file 500000\nactive_file 250000\n")
    monkeypatch.setattr(memory, "_CONTAINER_PARTS", parts)
    assert memory.available_bytes() == 3_750_000  # files that were read give way
    use.write_text("4999000\n")
    parts.write_text("inactive_file 0\nactive_file 0\n")
    assert memory.available_bytes() == 1000
    assert AdapterMemory().resolved(CPU).device_bytes == 250_000
    monkeypatch.setattr(memory, "_SYSTEM_MEMORY", tmp_path / "absent")
    assert memory.available_bytes() == 2_500_000


def test_samplers_take_a_quarter_of_the_room_and_the_one_used_last_stays(
    model_directory: Callable[[str], Path],
) -> None:
    directory = model_directory("qwen3")
    probe = Engine.load(directory, device="cpu", dtype="float32")
    weights_bytes = probe.adapter_bytes(SPEC) // 4
    memory_for_two = AdapterMemory(device_bytes=4 * 2 * weights_bytes)
    engine = Engine.load(directory, device="cpu", dtype="float32", adapter_memory=memory_for_two)
    engine.create_adapter("run", SPEC)
    empty_bytes = engine.adapter_room_bytes
    engine.keep_sampler("first", "run")
    engine.keep_sampler("second", "run")
    assert engine.adapter_room_bytes == empty_bytes - 2 * weights_bytes
    assert engine.use_sampler("first")
    engine.load_sampler("third", engine.export_state("run", optimizer=False, gradients=False))
    assert [engine.use_sampler(name) for name in ("first", "second", "third")] == [True, False, True]
    engine.drop_sampler("first")
    engine.drop_sampler("third")
    assert engine.adapter_room_bytes == empty_bytes


def test_the_memory_of_an_impossible_adapter_is_nothing(engine: Engine) -> None:
    assert engine.adapter_bytes(LoraSpec(rank=10**6, seed=0)) == 0
