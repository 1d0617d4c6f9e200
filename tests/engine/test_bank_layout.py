"""Where adapters lie side by side: views of a bank and of an adapter's own buffer that name the same factors."""

from __future__ import annotations

import pytest
import torch

from gpuworker.engine.adapters import UNEMBED, Layout, ModuleShape
from gpuworker.engine.bank_layout import BankLayout

SIZES = {"q_proj": (24, 40), "k_proj": (24, 16), "v_proj": (24, 16), "o_proj": (40, 24)}


def make_modules(num_layers: int) -> list[ModuleShape]:
    return [
        ModuleShape(f"layers.{i}.{name}", *size) for i in range(num_layers) for name, size in SIZES.items()
    ]


def make_groups(modules: list[ModuleShape]) -> list[list[ModuleShape]]:
    starts = range(0, len(modules), len(SIZES))
    return [group for i in starts for group in (modules[i : i + 3], modules[i + 3 : i + 4])]


@pytest.mark.parametrize("num_places", [1, 3])
@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("projections", [("q_proj", "k_proj", "v_proj", "o_proj"), ("k_proj", "o_proj")])
def test_what_is_put_lies_at_its_place_only(num_places: int, rank: int, projections: tuple[str, ...]) -> None:
    modules = make_modules(3)
    chosen = [module for module in modules if module.projection in projections]
    layout = Layout(rank, (*chosen, ModuleShape(UNEMBED, 24, 60)))
    bank = BankLayout(make_groups(modules), num_places=num_places, rank=8)
    flat_P, flat_Q = torch.randn(layout.num_parameters), torch.zeros(bank.num_parameters)
    place = num_places - 1
    stretches = bank.stretches(layout)
    assert len(stretches) == 2 * len(projections)  # not one for each layer
    for stretch in stretches:
        stretch.of_bank(flat_Q, place).copy_(stretch.of_adapter(flat_P))
    views = layout.views(flat_P)
    for name, (a_KRD, b_KFR) in bank.pairs(flat_Q).items():
        if name in views:
            torch.testing.assert_close(a_KRD[place, :rank], views[name].a, rtol=0, atol=0)
            torch.testing.assert_close(b_KFR[place, :, :rank], views[name].b, rtol=0, atol=0)
    head = sum(views[UNEMBED][i].count_nonzero() for i in (0, 1))
    assert flat_Q.count_nonzero() == flat_P.count_nonzero() - head


def test_layers_at_uneven_distances_come_by_themselves() -> None:
    modules = make_modules(4)
    layout = Layout(8, tuple(module for module in modules if module.name != "layers.1.q_proj"))
    bank = BankLayout(make_groups(modules), num_places=2, rank=8)
    flat_P, flat_Q = torch.randn(layout.num_parameters), torch.zeros(bank.num_parameters)
    for stretch in bank.stretches(layout):
        stretch.of_bank(flat_Q, 1).copy_(stretch.of_adapter(flat_P))
    views = layout.views(flat_P)
    for name, pair in bank.pairs(flat_Q).items():
        if name in views:
            assert torch.equal(pair.a[1], views[name].a)
            assert torch.equal(pair.b[1], views[name].b)
    assert flat_Q.count_nonzero() == flat_P.count_nonzero()


def test_columns_and_places_are_the_same_numbers() -> None:
    modules = make_modules(2)
    bank = BankLayout(make_groups(modules), num_places=2, rank=8)
    flat_Q = torch.randn(bank.num_parameters)
    assert bank.num_parameters == BankLayout.size(make_groups(modules), num_places=2, rank=8)
    columns, pairs = bank.columns(flat_Q), bank.pairs(flat_Q)
    q, k, v = (f"layers.1.{name}_proj" for name in "qkv")
    joined = torch.cat([pairs[name].a.flatten(0, 1) for name in (q, k, v)])
    assert torch.equal(columns.a[q, k, v], joined)
    assert torch.equal(columns.b[k], torch.cat([pairs[k].b[0], pairs[k].b[1]], dim=1))
