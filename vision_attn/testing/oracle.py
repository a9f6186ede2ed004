"""A block's two sides, the fast one and its definition, and how they are compared."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..gate import Gate
from .case import BATCH, HEADS, KEY, VALUE


def sides(block, grid, prefix) -> list[tuple[Callable, Callable, list[Tensor]]]:
    """A block's fast path, its definition and inputs for both: of each step, and of the whole if it has a reference."""
    if isinstance(block, Gate):
        return [(block.gate, block.reference, [torch.randn(BATCH, block.dim, *grid, dtype=torch.float64)])]
    found = [*whole_sides(block, grid, BATCH, prefix), *step_sides(block, grid, prefix)]
    assert found, f"{type(block).__name__} has neither steps nor a reference: nothing says what it should give"
    return found


def whole_sides(block, grid, batch, prefix):
    """That of a mixer with a reference."""
    if not hasattr(block, "reference"):
        return []
    x = torch.randn(batch, prefix + grid[0] * grid[1], block.dim, dtype=torch.float64)
    return [(lambda x: block(x, grid), lambda x: block.reference(x, grid), [x])]


def step_sides(block, grid, prefix):
    """Those of the steps of a mixer, whose inputs are queries, keys and values.

    With values as wide as keys, which takes torch's flash attention, and of another width, which does not.
    """
    shapes = [[(BATCH, HEADS, prefix + grid[0] * grid[1], d) for d in (KEY, KEY, value)] for value in (VALUE, KEY)]
    return [side for some in shapes for side in mixer_sides(block, grid, some)]


def mixer_sides(block, grid, shapes):
    return [
        (
            lambda q, k, v, step=step: step.mix(q, k, v, grid),
            lambda q, k, v, step=step: step.weights(q, k, grid) @ v,
            [torch.randn(shape, dtype=torch.float64) for shape in shapes],
        )
        for step in block.steps
    ]


def definition(block):
    """A copy of a block that computes by its definition."""
    block = copy.deepcopy(block)
    if isinstance(block, Gate):
        block.gate = block.reference
    elif hasattr(block, "reference"):
        block.forward = block.reference
    else:
        for step in block.steps:
            step.mix = lambda q, k, v, grid, step=step: step.weights(q, k, grid) @ v
    return block


def choosing_once(block):
    """The block, whose steps that choose by content (`choose`) choose once, also for copies that are made of it.

    Rounding decides between two choices that are nearly as good: what is compared must have made the same.
    """
    for step in getattr(block, "steps", ()):
        if hasattr(step, "choose"):
            step.choose = _once(step.choose)
    return block


def _once(choose):
    chosen = []

    def first(*args):
        if not chosen:
            chosen.append(choose(*args))
        return chosen[0]

    return first


def gradients(function, inputs, parameters):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return out, torch.autograd.grad(out, [*inputs, *parameters], direction, allow_unused=True, materialize_grads=True)


def assert_same_function(fast, plain, inputs, parameters):
    out, slopes = gradients(fast, inputs, parameters)
    expected, expected_slopes = gradients(plain, inputs, parameters)
    assert_equal(out, expected)
    assert_equal(slopes, expected_slopes)


def assert_equal(actual, expected):
    """Up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def error(actual, exact) -> float:
    return (actual.double() - exact).abs().max().item()


def definition_of(case, block, x, grid, dtype) -> list[Tensor]:
    """The definition's output and gradients in a type."""
    block, x = definition(copy.deepcopy(block).to(dtype)), x.detach().to(dtype).requires_grad_()
    out = case.run(block, x, grid)
    return [out, *torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out) / out[:1].numel())]
