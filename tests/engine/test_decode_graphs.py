"""Decode steps that can be recorded, run unrecorded: what they compute is the same on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpuworker.engine import lora_columns
from gpuworker.engine.adapter_bank import AdapterBank, BankedProducts
from gpuworker.engine.adapters import Adapter, LoraWeights, ModuleShape, select_modules
from gpuworker.engine.bank_layout import fitting_rank
from gpuworker.engine.decode_graphs import DecodeGraphs
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import EngineError
from gpuworker.engine.types import LoraSpec, SampleResult

from .conftest import CONFIGS
from .sampling_requests import GREEDY, finish, make_request, mixed_requests, sample

MODULES = (ModuleShape("up_proj", 24, 40), ModuleShape("down_proj", 40, 24))


@pytest.fixture
def with_graphs() -> Iterator[Callable[..., None]]:
    """Let an engine decode as it does on a GPU, until the end of the test."""
    changed: list[Engine] = []

    def switch(engine: Engine, *, max_bytes: int = 1 << 30) -> None:
        sampler = engine.sampler
        sampler._graphs = DecodeGraphs(sampler._base, sampler._head, sampler._cache, max_bytes=max_bytes)
        changed.append(engine)

    yield switch
    for engine in changed:
        engine.sampler._graphs = None


def assert_alike(actual: dict[str, SampleResult], expected: dict[str, SampleResult]) -> None:
    assert actual.keys() == expected.keys()
    for request_id, result in expected.items():
        for ours, theirs in zip(actual[request_id].sequences, result.sequences, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_mixed_adapters_get_the_tokens_of_the_plain_path(
    architecture: str, load_engine: Callable[..., Engine], with_graphs: Callable[..., None]
) -> None:
    """Ranks that are no multiple of the alignment, several samples of a prompt, windows and softcaps."""
    engine = load_engine(architecture)
    requests = [replace(r, num_samples=2) for r in mixed_requests(engine, ranks=(3, 16))]
    expected = sample(engine, requests)
    with_graphs(engine)
    assert_alike(sample(engine, requests), expected)


@pytest.mark.parametrize("odd", [None, torch.inf, -torch.inf])
def test_an_ill_sampler_takes_no_other_along(
    odd: float | None, engine: Engine, with_graphs: Callable[..., None]
) -> None:
    """Its weights are no numbers, or one of the head's is infinite, which a prompt's first token may survive."""
    requests = mixed_requests(engine, ranks=(8, 8))[:3]
    views = engine.sampler.weights._held[str(requests[2].sampler_id)][1].pairs
    if odd is None:
        views.flat_P.fill_(torch.nan)
    else:
        views["lm_head"].b[0, 0] = odd

    def outcomes() -> dict[str, SampleResult | EngineError]:
        for request in requests:
            engine.sampler.submit(request)
        return finish(engine.sampler)

    expected = outcomes()
    with_graphs(engine)
    for _ in range(2):
        actual = outcomes()
        assert type(actual[requests[2].request_id]) is type(expected[requests[2].request_id])
        assert_alike(
            *(
                {key: one for key, one in some.items() if isinstance(one, SampleResult)}
                for some in (actual, expected)
            )
        )


def test_a_bank_of_many_columns_gives_way_to_a_small_one(
    engine: Engine, with_graphs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_columns, "MAX_COLUMNS", 16)
    with_graphs(engine)
    sizes = []
    for ranks in ((8,) * 7, (8,), (8, 8)):
        expected = sample(engine, mixed_requests(engine, ranks=ranks))
        assert_alike(sample(engine, mixed_requests(engine, ranks=ranks)), expected)
        graphs = engine.sampler._graphs
        assert graphs is not None
        assert graphs._bank is not None
        sizes.append(graphs._bank.num_columns)
    assert sizes == [64, 8, 16]


def test_more_adapters_than_places_and_other_ranks_later(
    engine: Engine, with_graphs: Callable[..., None]
) -> None:
    expected = [sample(engine, mixed_requests(engine, ranks=ranks)) for ranks in [(2,), (4,) * 7, (12, 1)]]
    with_graphs(engine)
    actual = [sample(engine, mixed_requests(engine, ranks=ranks)) for ranks in [(2,), (4,) * 7, (12, 1)]]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_alike(ours, theirs)


def test_a_cache_that_grows_meanwhile_is_followed(engine: Engine, with_graphs: Callable[..., None]) -> None:
    """A longer prompt comes to a sequence that is being decoded, and moves every slot to larger pools."""
    long = make_request("long", 90)

    def run() -> dict[str, SampleResult]:
        sampler = engine.sampler
        sampler.submit(make_request("short", 5, params=replace(GREEDY, max_tokens=20)))
        for _ in range(4):
            sampler.step()
        return sample(engine, [long])

    expected = run()
    with_graphs(engine)
    assert_alike(run(), expected)


def test_steps_without_room_take_the_plain_path(engine: Engine, with_graphs: Callable[..., None]) -> None:
    """Too little for a bank of two adapters, then too little for the keys of a step."""
    requests = mixed_requests(engine, ranks=(8, 8))
    expected = sample(engine, requests)
    for max_bytes in (100_000, 1):
        with_graphs(engine, max_bytes=max_bytes)
        assert_alike(sample(engine, requests), expected)
        graphs = engine.sampler._graphs
        assert graphs is not None
        assert graphs._bank is None or graphs._bank.num_places < 2


def make_weights(rank: int, seed: int) -> LoraWeights:
    spec = LoraSpec(rank=rank, seed=seed)
    layout = select_modules(spec, MODULES, max_rank=16)
    adapter = Adapter(spec, layout, device=torch.device("cpu"), dtype=torch.float32)
    adapter.master_P.copy_(torch.randn(len(adapter.master_P)))
    return adapter.weights


def make_bank(num_places: int, rank: int) -> AdapterBank:
    return AdapterBank(
        [(module,) for module in MODULES],
        num_places=num_places,
        rank=rank,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_a_bank_keeps_wanted_adapters_in_their_places_and_clears_what_it_reuses() -> None:
    torch.manual_seed(0)
    wide, other, narrow = make_weights(8, 1), make_weights(8, 2), make_weights(3, 3)
    bank = make_bank(2, fitting_rank([wide, narrow]))
    first = bank.places([wide, other])
    second = bank.places([wide, narrow])
    assert second[id(wide)] == first[id(wide)]
    assert second[id(narrow)] == first[id(other)]
    place = second[id(narrow)]
    a_RD, b_FR = (factor[place] for factor in bank.pairs["up_proj"])
    assert torch.equal(a_RD[:3], narrow.pairs["up_proj"].a)
    assert not a_RD[3:].any()
    assert torch.equal(b_FR[:, :3], narrow.pairs["up_proj"].b * narrow.scaling)
    assert not b_FR[:, 3:].any()


def test_huge_factors_reach_no_row_of_another_adapter() -> None:
    """The rows' products with the other adapter's A are beyond what a number holds."""
    torch.manual_seed(0)
    tame, wild = make_weights(8, 1), make_weights(8, 2)
    bank = make_bank(2, 8)
    places = bank.places([tame, wild])
    bank.pairs["up_proj"].a[places[id(wild)]] = 3e38
    rows_SD, output_SF = torch.randn(3, 24), torch.zeros(3, 40)
    assert not torch.isfinite(rows_SD.mm(bank.columns.a["up_proj",].t())).all()
    places_S = torch.tensor([places[id(tame)], places[id(tame)], bank.num_places])
    BankedProducts(bank, places_S).add(output_SF, rows_SD, "up_proj")
    a_RD, b_FR = tame.pairs["up_proj"]
    torch.testing.assert_close(output_SF[:2], tame.scaling * rows_SD[:2].mm(a_RD.t()).mm(b_FR.t()))
    assert not output_SF[2].any()


def test_fitting_rank_rounds_up_to_what_kernels_want() -> None:
    assert [fitting_rank([make_weights(rank, 0)]) for rank in (1, 8, 9)] == [8, 8, 16]
    assert fitting_rank([]) == 8
