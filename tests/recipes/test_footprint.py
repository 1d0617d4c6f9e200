"""What a run takes of memory and disk: the arithmetic, and remedies that really help."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs.recipes import footprint
from runs.recipes.footprint import Fit, Load, Memory
from runs.schemas.recipes import LoraSettings
from runs.services.base_models import ModelSizes

SIZES = ModelSizes(
    weight_bytes=1_000_000_000,
    attn_width=10_000,
    mlp_width=20_000,
    unembed_width=5_000,
    working_bytes=2,
    row_bytes=100_000,
    batch_rows=2_000,
    head_bytes=10_000_000,
)
LOAD = Load(lora=LoraSettings(rank=8), longest_row=1_000, batch_size=4)
GB = 1_000_000_000


def memory(load: Load = LOAD, *, total: int = 8 * GB, other: int = 0, sizes: ModelSizes = SIZES) -> Memory:
    return footprint.memory_of(load, sizes, other_bytes=other, total_bytes=total)


def changed(load: Load, remedy: str) -> Load:
    """Return the load with a remedy followed, as a person would read it."""
    words = remedy.replace(",", "").split()
    numbers = {words[index - 1]: int(words[index + 1]) for index, word in enumerate(words) if word == "to"}
    lora = load.lora.model_copy(update={"rank": numbers.get("rank", load.lora.rank)})
    return replace(
        load,
        lora=lora,
        longest_row=min(load.longest_row, numbers.get("length", load.longest_row)),
        batch_size=numbers.get("size", load.batch_size),
        batch_tokens=numbers.get("batch", load.batch_tokens) if load.batch_tokens else None,
    )


def test_an_adapter_has_its_rank_times_the_widths_of_what_it_trains() -> None:
    assert footprint.num_adapter_parameters(SIZES, LoraSettings(rank=8)) == 8 * 30_000
    all_of_it = LoraSettings(rank=2, train_unembed=True)
    assert footprint.num_adapter_parameters(SIZES, all_of_it) == 2 * 35_000
    attention = LoraSettings(rank=1, train_mlp=False)
    assert footprint.num_adapter_parameters(SIZES, attention) == 10_000
    assert footprint.checkpoint_bytes(SIZES, attention) == 10_000 * 12
    assert footprint.adapter_bytes(SIZES, attention) == 10_000 * (16 + 2)


def test_the_parts_add_up() -> None:
    # 4 rows of 1,000 tokens are two passes of 2,000.
    kept = 2_000 * 100_000 * footprint.KEPT_FACTOR
    parts = footprint.PROCESS_BYTES + GB + 240_000 * 18 + kept + 10_000_000
    assert memory().needed_bytes == int(parts)
    assert memory(other=5).needed_bytes == int(parts) + 5
    longer = replace(LOAD, longest_row=3_000)  # goes through alone
    assert memory(longer).needed_bytes == int(parts + 1_000 * 100_000 * footprint.KEPT_FACTOR)
    assert memory(replace(LOAD, batch_size=64)).needed_bytes == memory().needed_bytes
    assert memory(replace(LOAD, batch_tokens=1_500)).needed_bytes == int(parts - 500 * 130_000)


def test_a_fit_is_told_in_four_words() -> None:
    needed = memory().needed_bytes
    assert memory(total=needed - 1).fit is Fit.TOO_LARGE
    assert memory(total=needed).fit is Fit.TIGHT
    assert memory(total=int(needed / 0.85) + 2).fit is Fit.FITS
    assert memory(total=0).fit is Fit.UNKNOWN
    assert memory(sizes=ModelSizes()).fit is Fit.UNKNOWN
    assert memory(total=2 * needed).remedy == ""


@pytest.mark.parametrize(
    ("load", "total", "remedy"),
    [
        (replace(LOAD, batch_size=8, longest_row=200), 1.90, "lower the batch size to 4"),
        (replace(LOAD, batch_size=8, longest_row=200), 1.80, "lower the batch size to 2"),
        (LOAD, 1.85, "lower the max length to 512 and the batch size to 1"),
        (replace(LOAD, batch_size=1, longest_row=1_900), 1.95, "lower the max length to 1,024"),
        (replace(LOAD, batch_tokens=2_000), 1.95, "lower the batch to 1,024 tokens"),
        (replace(LOAD, lora=LoraSettings(rank=1024), longest_row=64), 2.1, "lower the LoRA rank to 512"),
        (LOAD, 1.0, "no setting of this run helps; choose a smaller base model or another device"),
    ],
)
def test_a_remedy_is_the_smallest_change_that_helps(load: Load, total: float, remedy: str) -> None:
    assert memory(load, total=int(total * GB)).remedy == remedy


@given(
    load=st.builds(
        Load,
        lora=st.builds(LoraSettings, rank=st.integers(1, 1024), train_unembed=st.booleans()),
        longest_row=st.integers(8, 20_000),
        batch_size=st.integers(1, 512),
        batch_tokens=st.none() | st.integers(16, 20_000),
    ),
    total=st.integers(1_400_000_000, 8 * GB),
)
def test_whoever_follows_a_remedy_has_a_run_that_fits(load: Load, total: int) -> None:
    found = memory(load, total=total)
    if found.fit is Fit.FITS:
        assert found.remedy == ""
    elif not found.remedy.startswith("no setting"):
        better = changed(load, found.remedy)
        assert better != load
        assert memory(better, total=total).fit is Fit.FITS, (found.remedy, better)
