"""Training passes that can be recorded, run unrecorded: what they compute is the same on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpuworker.engine import lora_columns, train_graphs
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import NonFiniteError
from gpuworker.engine.train_graphs import Size, TrainGraphs, recorded_rows
from gpuworker.engine.training_bank import TrainingBank
from gpuworker.engine.types import AdamParams, ForwardBackward, ForwardBackwardResult, LoraSpec, OptimStep

from .conftest import CONFIGS
from .jobs import make_job, results, take_gradient
from .reference import make_adapter
from .refusing import Refusing
from .test_training import ALL_SPECS

LENGTHS = [21, 1, 64, 9]


class CountedGraphs(TrainGraphs):
    """Counts the batches that it served; `device` says whether there is memory for what they need."""

    num_served = 0
    device: AbstractContextManager[object] = nullcontext()

    def find(self, *batch):  # type: ignore[no-untyped-def]
        with self.device:
            found = super().find(*batch)
        self.num_served += found is not None
        return found


@pytest.fixture
def with_graphs() -> Iterator[Callable[..., CountedGraphs]]:
    """Let an engine train as it does on a GPU, until the end of the test."""
    changed: list[Engine] = []

    def switch(engine: Engine, *, max_bytes: int = 1 << 30, row_bytes: int = 10_000) -> CountedGraphs:
        graphs = CountedGraphs(engine._base, row_bytes=row_bytes, max_bytes=max_bytes)
        engine._trainer._graphs = graphs
        changed.append(engine)
        return graphs

    yield switch
    for engine in changed:
        engine._trainer._graphs = None


def train(engine: Engine, jobs: list[ForwardBackward]) -> list[tuple[ForwardBackwardResult, torch.Tensor]]:
    """Return what every job answers and the gradient that it leaves behind."""
    outcomes = results(engine.forward_backward(jobs))
    return [
        (result, take_gradient(engine, job.adapter_id)) for job, result in zip(jobs, outcomes, strict=True)
    ]


def assert_alike(
    actual: list[tuple[ForwardBackwardResult, torch.Tensor]],
    expected: list[tuple[ForwardBackwardResult, torch.Tensor]],
) -> None:
    for (ours, gradient_P), (theirs, expected_P) in zip(actual, expected, strict=True):
        for left, right in zip(ours.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-4, rtol=0)
        assert (gradient_P - expected_P).norm() / expected_P.norm() < 1e-4


@pytest.mark.parametrize("max_columns", [256, 0], ids=["columns", "grouped"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_mixed_adapters_get_the_results_of_the_plain_way(
    architecture: str,
    max_columns: int,
    load_engine: Callable[..., Engine],
    with_graphs: Callable[..., CountedGraphs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks that are no multiple of the alignment, parts of the modules, windows and softcaps."""
    monkeypatch.setattr(lora_columns, "MAX_COLUMNS", max_columns)
    engine = load_engine(architecture)
    jobs = [make_job(f"pass-{i}", np.random.default_rng(i), LENGTHS[i % 3 :]) for i in range(len(ALL_SPECS))]
    for job, spec in zip(jobs, ALL_SPECS, strict=True):
        make_adapter(engine, job.adapter_id, spec)
    expected = train(engine, jobs)
    graphs = with_graphs(engine)
    assert_alike(train(engine, jobs), expected)
    assert graphs.num_served == 1


def test_a_place_forgets_the_adapter_before(
    engine: Engine, with_graphs: Callable[..., CountedGraphs]
) -> None:
    """A small adapter in the place of a larger one, another length, and gradients from zero each time."""
    large, small = (LoraSpec(rank=8, seed=1), LoraSpec(rank=3, seed=2, train_mlp=False))
    jobs = []
    for name, spec, lengths in (("large", large, [40, 20]), ("small", small, [33, 20, 2])):
        make_adapter(engine, name, spec)
        jobs.append(make_job(name, np.random.default_rng(len(lengths)), lengths))
    expected = [train(engine, [job]) for job in jobs]
    graphs = with_graphs(engine)
    for _ in range(2):
        for job, results_of_job in zip(jobs, expected, strict=True):
            assert_alike(train(engine, [job]), results_of_job)
    assert graphs.num_served == 4


def test_an_ill_run_takes_no_neighbour_along(
    engine: Engine, with_graphs: Callable[..., CountedGraphs]
) -> None:
    """Its weights are no numbers: both are run anew by themselves, and later it has a batch of its own until it is mended."""
    tame, wild = (make_job(name, np.random.default_rng(9), LENGTHS) for name in ("tame", "wild"))
    make_adapter(engine, "tame", LoraSpec(rank=8, seed=1))
    whole = make_adapter(engine, "wild", LoraSpec(rank=8, seed=2))
    expected = train(engine, [tame, wild])
    graphs = with_graphs(engine)
    engine.import_state("wild", replace(whole, weights=whole.weights * torch.nan), optimizer=False)
    for num_served in (3, 5):
        ours, error = engine.forward_backward([tame, wild])
        assert isinstance(ours, ForwardBackwardResult)
        assert_alike([(ours, take_gradient(engine, "tame"))], expected[:1])
        assert isinstance(error, NonFiniteError)
        assert graphs.num_served == num_served
    engine.import_state("wild", whole, optimizer=False)
    for num_served in (7, 8):
        assert_alike(train(engine, [tame, wild]), expected)
        assert graphs.num_served == num_served


def test_a_job_of_several_batches_that_met_an_ill_one_is_run_again_as_a_whole(
    engine: Engine, with_graphs: Callable[..., CountedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of its own, the second with a block of the ill run; then both anew, and each of the ill run's two."""
    monkeypatch.setattr(engine._trainer, "_token_budget", 48)
    tame = make_job("tame-long", np.random.default_rng(1), [20, 20, 20])
    wild = make_job("wild-long", np.random.default_rng(2), [10, 40])
    make_adapter(engine, "tame-long", LoraSpec(rank=8, seed=1))
    state = make_adapter(engine, "wild-long", LoraSpec(rank=8, seed=2))
    expected = train(engine, [tame])
    engine.import_state("wild-long", replace(state, weights=state.weights * torch.nan), optimizer=False)
    graphs = with_graphs(engine)
    ours, error = engine.forward_backward([tame, wild])
    assert isinstance(ours, ForwardBackwardResult)
    assert_alike([(ours, take_gradient(engine, "tame-long"))], expected)
    assert isinstance(error, NonFiniteError)
    assert graphs.num_served == 3 + 2 + 2


def test_new_weights_are_used_after_a_step(engine: Engine, with_graphs: Callable[..., CountedGraphs]) -> None:
    spec, job = LoraSpec(rank=8, seed=3), make_job("stepped", np.random.default_rng(0), LENGTHS)
    answers = []
    for switch in (lambda _: None, with_graphs):
        make_adapter(engine, "stepped", spec)
        switch(engine)
        for _ in range(3):
            (result,) = results(engine.forward_backward([job]))
            engine.optim_step([OptimStep(adapter_id="stepped", params=AdamParams(learning_rate=1e-2))])
        answers.append(result.metrics["loss:sum"])
    assert answers[1] == pytest.approx(answers[0], rel=1e-4)


def test_two_jobs_of_one_run_in_a_batch_add_up(
    engine: Engine, with_graphs: Callable[..., CountedGraphs]
) -> None:
    make_adapter(engine, "twice", LoraSpec(rank=8, seed=4))
    jobs = [make_job("twice", np.random.default_rng(seed), [30, 5]) for seed in range(2)]
    results(engine.forward_backward(jobs))
    expected = take_gradient(engine, "twice")
    graphs = with_graphs(engine)
    results(engine.forward_backward(jobs))
    assert (take_gradient(engine, "twice") - expected).norm() / expected.norm() < 1e-4
    assert graphs.num_served == 1


@pytest.mark.parametrize(("lengths", "num_served"), [([2] * 40, 1), ([60, 60], 0)])
def test_batches_without_room_take_the_plain_way(
    lengths: list[int], num_served: int, engine: Engine, with_graphs: Callable[..., CountedGraphs]
) -> None:
    make_adapter(engine, "odd", LoraSpec(rank=8, seed=5))
    job = make_job("odd", np.random.default_rng(0), lengths)
    expected = train(engine, [job])
    graphs = with_graphs(engine, max_bytes=1 << 20)
    assert_alike(train(engine, [job]), expected)
    assert graphs.num_served == num_served


def test_banks_of_many_kinds_keep_to_their_room(
    engine: Engine, with_graphs: Callable[..., CountedGraphs]
) -> None:
    room = TrainingBank.num_bytes(engine._base.groups, num_places=2, rank=16, dtype=torch.float32)
    graphs = with_graphs(engine, max_bytes=room, row_bytes=1_000)
    for rank in (3, 8, 16):
        make_adapter(engine, f"kind-{rank}", LoraSpec(rank=rank, seed=rank))
    jobs = [make_job(f"kind-{rank}", np.random.default_rng(rank), [9]) for rank in (3, 8, 16)]
    for _ in range(2):
        for chosen in (jobs[:1], jobs[1:2], jobs[:2], jobs[2:]):
            results(engine.forward_backward(chosen))
            held = {id(one.bank): one.bank for one in graphs._passes.values()}.values()
            assert 0 < sum(bank.weights_Q.nbytes + bank.gradients_Q.nbytes for bank in held) <= room
    assert graphs.num_served == 8


def test_a_lack_of_memory_keeps_passes_from_being_recorded_for_a_time_only(
    engine: Engine,
    with_graphs: Callable[..., CountedGraphs],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Half of the room does not do for this batch, and the device refuses the bank twice."""
    monkeypatch.setattr(train_graphs, "_BATCHES_BETWEEN_TRIES", 3)
    make_adapter(engine, "spike", LoraSpec(rank=8, seed=7))
    job = make_job("spike", np.random.default_rng(0), [60])
    bank_bytes = TrainingBank.num_bytes(engine._base.groups, num_places=1, rank=8, dtype=torch.float32)
    graphs = with_graphs(engine, max_bytes=max(bank_bytes, 64 * 11_000))
    graphs.device = Refusing(num_allowed=0, max_refused=2)
    caplog.set_level("INFO", logger=train_graphs.__name__)
    served = []
    for _ in range(9):
        before = graphs.num_served
        results(engine.forward_backward([job]))
        served.append(graphs.num_served > before)
    assert served == [False] * 6 + [True] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] * 2


def test_a_forward_leaves_no_gradient(engine: Engine, with_graphs: Callable[..., CountedGraphs]) -> None:
    make_adapter(engine, "looked-at", LoraSpec(rank=8, seed=6))
    job = make_job("looked-at", np.random.default_rng(0), LENGTHS)
    forward = ForwardBackward(adapter_id="looked-at", data=job.data, loss_fn="cross_entropy", backward=False)
    (expected,) = results(engine.forward_backward([forward]))
    graphs = with_graphs(engine)
    (actual,) = results(engine.forward_backward([forward]))
    for left, right in zip(actual.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4, rtol=0)
    assert graphs.num_served == 1
    assert engine.export_state("looked-at", optimizer=False, gradients=True).gradient is None


def test_sizes_are_few_and_waste_little() -> None:
    for num_rows in (1, 16, 64, 65, 100, 480, 1000, 2048, 2049, 4352):
        size = recorded_rows(num_rows)
        assert num_rows <= size <= max(64, num_rows * 1.25)
        assert recorded_rows(size) == size
    assert len({recorded_rows(n) for n in range(512, 4096)}) == 25


@pytest.mark.parametrize("lengths", [[1], [5] * 7, [5] * 100, [1000, 3], [129] * 20, [2049]])
def test_a_size_has_room_for_its_batch_and_the_padding(lengths: list[int]) -> None:
    size = Size.of(lengths, 3, 16)
    missing = size.num_rows - sum(lengths)
    assert max(lengths) <= size.max_length
    assert len(lengths) + -(-missing // size.max_length) <= size.num_sequences
    assert (size.num_places, size.rank) == (4, 16)
