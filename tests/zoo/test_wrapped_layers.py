"""Blocks whose layers were exchanged for others of the same function: low-rank updates (LoRA), quantised weights."""

import copy

import pytest
import torch
from conftest import alive
from torch import nn

from vision_attn import Grid
from vision_attn.layout import OnMap

GRID = Grid(3, 7)


class LowRank(nn.Module):
    """A linear layer plus B A, of rank 2, which has nothing else of a linear layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        factory = dict(bias=False, dtype=layer.weight.dtype)
        self.a, self.b = nn.Linear(layer.in_features, 2, **factory), nn.Linear(2, layer.out_features, **factory)

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


class Hidden(nn.Module):
    """A layer that shows nothing of itself."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def wrapped_and_merged(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy with low-rank updates beside linear layers, and hidden convolutions; and one with changed weights."""
    wrapped, merged = copy.deepcopy(module), copy.deepcopy(module)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            new = LowRank(wrapped.get_submodule(name))
            with torch.no_grad():
                merged.get_submodule(name).weight += new.b.weight @ new.a.weight
            wrapped.set_submodule(name, new)
        elif isinstance(layer, nn.Conv2d):
            wrapped.set_submodule(name, Hidden(wrapped.get_submodule(name)))
    return wrapped, merged


def test_low_rank_updates_beside_every_linear_layer_are_changed_weights(any_case):
    layer = any_case.layer()
    wrapped, merged = wrapped_and_merged(layer)
    x = any_case.map(GRID)
    torch.testing.assert_close(wrapped(x), merged(x), rtol=1e-9, atol=1e-10)


def test_pixel_by_pixel_with_low_rank_updates(causal_case):
    wrapped, merged = wrapped_and_merged(causal_case.block())
    x = causal_case.input(GRID, prefix=0)
    cache = wrapped.new_cache(len(x), GRID)
    steps = [wrapped.step(pixel, place, cache) for place, pixel in enumerate(x.unbind(1))]
    torch.testing.assert_close(torch.stack(steps, dim=1), merged(x, GRID), rtol=1e-8, atol=1e-9)


def quantised(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_linear_layers_keep_the_answers(any_case):
    layer = alive(OnMap(any_case.new())).eval()
    small, x = quantised(layer), any_case.map(GRID).float()
    assert not any(type(part) is nn.Linear for part in small.modules())
    error = (small(x) - layer(x)).norm() / (layer(x) - x).norm()
    assert error < 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pixel_by_pixel_with_quantised_linear_layers(causal_case):
    block = causal_case.new().eval()
    small, x = quantised(block), causal_case.input(GRID, prefix=0).float()
    cache = small.new_cache(len(x), GRID)
    steps = torch.stack([small.step(pixel, place, cache) for place, pixel in enumerate(x.unbind(1))], dim=1)
    assert (steps - block(x, GRID)).norm() / block(x, GRID).norm() < 0.1
