"""`torch.jit.trace`: what was recorded at one size is right at any other, or fails there."""

import pytest
import torch
from conftest import in_turn, often
from torch.testing import assert_close
from traced import EVERY, MIXERS, OTHERS, TRACED, WithPrefix, inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch would rather have its newer ways used
    pytest.mark.filterwarnings("error::torch.jit.TracerWarning"),  # what depends on a number of the input is not traced
]


def trace(module, args):
    return torch.jit.trace(module, args, check_trace=False)  # which would trace three times


@pytest.mark.parametrize("case", EVERY)
def test_a_traced_layer_is_right_at_any_size_with_its_gradients(case):
    layer = case.layer()
    traced = trace(layer, inputs(case, TRACED, dtype=torch.float64))
    for size in (TRACED, *OTHERS):
        (x,) = inputs(case, size, dtype=torch.float64)
        assert_close(traced(x), layer(x), rtol=1e-9, atol=1e-9)
    (x,) = inputs(case, TRACED, dtype=torch.float64)
    known, slope = [x.requires_grad_(), *layer.parameters()], torch.randn_like(x)
    got, wanted = (torch.autograd.grad(run(x), known, slope, allow_unused=True) for run in (traced, layer))
    for a, b in zip(got, wanted):
        assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", often(EVERY))
@torch.no_grad()
def test_a_layer_is_traced_without_gradients(case):
    layer = case.layer()
    traced = trace(layer, inputs(case, TRACED, dtype=torch.float64))
    for size in (TRACED, OTHERS[0]):
        (x,) = inputs(case, size, dtype=torch.float64)
        assert_close(traced(x), layer(x), rtol=1e-9, atol=1e-9)


@in_turn({"case": often(MIXERS), "prefix, other": [(5, 2), (5, 7), (0, 3)]})
def test_a_traced_mixer_takes_any_grid_but_no_other_number_of_prefix_tokens(case, prefix, other):
    module = WithPrefix(case.block())
    traced = trace(module, inputs(case, TRACED, prefix, torch.float64))
    for size in (TRACED, OTHERS[0]):
        args = inputs(case, size, prefix, torch.float64)
        assert_close(traced(*args), module(*args), rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError):
        traced(*inputs(case, TRACED, other, torch.float64))
