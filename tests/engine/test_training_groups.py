"""Layers that read the same input share one product; one that reads another must not notice."""

from __future__ import annotations

import torch

from gpuworker.engine.adapters import Layout, LoraWeights, ModuleShape
from gpuworker.engine.lora import Route, RoutedLinear, Segment

NUM_ROWS, NUM_FEATURES = 20, 8


def make_group(route: Route) -> tuple[RoutedLinear, RoutedLinear]:
    torch.manual_seed(0)
    group = tuple(RoutedLinear(torch.nn.Linear(NUM_FEATURES, size), f"{size}", route) for size in (6, 4))
    for layer in group:
        layer.requires_grad_(False)
        layer.group = group
    return group[0], group[1]


def make_segment(layers: tuple[RoutedLinear, ...], start: int, stop: int) -> Segment:
    """Return rows whose adapter trains the given layers, with gradients of zero to add to."""
    modules = tuple(ModuleShape(layer.name, NUM_FEATURES, layer.weight.shape[0]) for layer in layers)
    layout = Layout(3, modules)
    weights, gradients = (layout.views(make(layout.num_parameters)) for make in (torch.randn, torch.zeros))
    return Segment(start, stop, LoraWeights(weights, 1.7), gradients)


def plain(layer: RoutedLinear, inputs: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
    """Return what one layer must give, by autograd through every product."""
    output = torch.nn.functional.linear(inputs, layer.weight, layer.bias)[0]
    for segment in segments:
        if layer.name in segment.weights.pairs:
            pair = segment.weights.pairs[layer.name]
            rows = inputs[0, segment.start : segment.stop]
            added = segment.weights.scaling * rows @ pair.a.t() @ pair.b.t()
            output = output + torch.nn.functional.pad(added, (0, 0, segment.start, NUM_ROWS - segment.stop))
    return output[None]


def check(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compare outputs, input gradients and factor gradients of a group with those of plain layers."""
    route = Route()
    group = make_group(route)
    segments = (make_segment(group, 0, 7), make_segment(group[1:], 7, 15))
    route.products = segments
    outputs = [layer(one) for layer, one in zip(group, inputs, strict=True)]
    slopes = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, slopes)
    found = [one.grad for one in inputs]
    for one in inputs:
        one.grad = None
    factors = [factor for segment in segments for pair in segment.weights.pairs.values() for factor in pair]
    for factor in factors:
        factor.requires_grad_()
    expected = [plain(layer, one, segments) for layer, one in zip(group, inputs, strict=True)]
    torch.testing.assert_close(outputs, expected)
    torch.autograd.backward(expected, slopes)
    torch.testing.assert_close(found, [one.grad for one in inputs])
    filled = [g for s in segments if s.gradients for pair in s.gradients.values() for g in pair]
    torch.testing.assert_close(filled, [factor.grad for factor in factors])


def test_siblings_with_one_input_give_what_plain_layers_give() -> None:
    shared = torch.randn(1, NUM_ROWS, NUM_FEATURES, requires_grad=True)
    check((shared, shared))


def test_siblings_with_two_inputs_do_not_mix_them_up() -> None:
    one, other = (torch.randn(1, NUM_ROWS, NUM_FEATURES, requires_grad=True) for _ in range(2))
    check((one, other))


def test_siblings_with_one_input_are_one_step_of_autograd() -> None:
    route = Route()
    group = make_group(route)
    shared = torch.randn(1, NUM_ROWS, NUM_FEATURES, requires_grad=True)
    steps = [layer(shared).grad_fn.next_functions[0][0] for layer in group]
    assert steps[0] is steps[1]


def test_a_cleared_route_keeps_no_output_of_a_batch_that_broke_off() -> None:
    route = Route()
    group = make_group(route)
    shared = torch.randn(1, NUM_ROWS, NUM_FEATURES)
    group[0](shared)
    route.clear()
    route.products = (make_segment(group, 0, NUM_ROWS),)
    torch.testing.assert_close(group[1](shared), plain(group[1], shared, tuple(route.products)))
