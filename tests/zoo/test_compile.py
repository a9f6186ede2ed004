"""torch.compile of every block: one graph, any size, the same numbers."""

import copy

import pytest
import torch
from conftest import chosen, first_options

from vision_attn.testing.case import BATCH

SIZES = [(29, 31), (37, 29), (31, 41)]  # more than one tile each way: one is a case of its own to torch


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def assert_compiles(module, inputs, graphs):
    """The module in at most so many graphs: its outputs, gradients and statistics over several inputs."""
    compiled = torch.compile(copied := copy.deepcopy(module), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=graphs):
        for args in inputs:
            out, expected = compiled(*args), module(*args)
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
            direction = torch.randn_like(out)
            out.backward(direction), expected.backward(direction)
    for p, other in zip(copied.parameters(), module.parameters()):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-9, atol=1e-10)
    for tensor, other in zip(copied.buffers(), module.buffers()):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-10)


def maps(channels):
    return [[torch.randn(BATCH, channels, *size, dtype=torch.float64)] for size in SIZES]


@pytest.mark.parametrize("case", first_options(chosen("gate_case")))
def test_compiled_gate_is_the_gate_in_training(case):
    """Also over several inputs without an optimizer step between them, as when gradients are accumulated."""
    gate = case.block().train()
    assert_compiles(gate, maps(gate.dim), graphs=2)  # one more, for what is None at first


@pytest.mark.slow
def test_compiled_mixer_takes_prefix_tokens_on_any_grid(mixer_case):
    assert_compiles(mixer_case.block(), [[mixer_case.input(size), size] for size in SIZES], graphs=1)
