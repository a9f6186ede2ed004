"""The fast path is the definition: exactly in float64, as well as rounding allows elsewhere."""

import copy
import itertools

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from ..engines.route import route
from ..grid import Grid
from .arguments import arguments, values_of
from .case import EXAMPLES, GRID, GRIDS, PREFIXES, SMALL, holds_for, lived_in
from .oracle import (
    assert_equal,
    assert_same_function,
    choosing_once,
    definition,
    error,
    mixer_sides,
    sides,
    whole_sides,
)


@holds_for("any")
def fast_path_is_the_definition(case):
    """The fast path gives what the definition says, values and gradients, in float64."""
    block, prefixes = case.block(), PREFIXES if case.is_mixer else [0, 0]  # one of each in training, in turn
    for (i, grid), (j, prefix) in itertools.product(enumerate(GRIDS), enumerate(prefixes)):
        block.train(training := (i + j) % 2 == 1)
        with case.trying(grid=grid, prefix=prefix, training=training):
            for fast, plain, inputs in sides(block, grid, prefix):
                assert_same_function(fast, plain, inputs, list(block.parameters()))


@holds_for("routed")
def routes_give_the_same(case):
    """A pattern's mask, its key sets in one softmax and the routes that are merged give what the definition says."""
    block = case.block()
    for name, grid, prefix in itertools.product(("auto", "dense", "flat"), GRIDS, PREFIXES):
        with case.trying(route=name, grid=grid, prefix=prefix), route(name):
            for fast, plain, inputs in sides(block, grid, prefix):
                assert_same_function(fast, plain, inputs, list(block.parameters()))


@holds_for("any", slow=True)
def fast_path_is_the_definition_at_any_size_with_any_options(case):
    """The fast path is the definition for any batch, grid, prefix, heads, channels and options, drawn by hypothesis."""
    numbers = st.fixed_dictionaries(
        dict(batch=st.integers(1, 3), grid=st.tuples(st.integers(1, 13), st.integers(1, 13)), prefix=st.integers(0, 5))
    )
    own = {name: values_of(annotation) for name, annotation in arguments(case.block_class).items()}
    options = st.fixed_dictionaries({}, optional={name: values for name, values in own.items() if values is not None})

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(numbers, options, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
    def holds(numbers, options, heads, value, key):
        options = {**case.options, **options}
        if case.is_mixer:
            sizes = dict(dim=heads * value, num_heads=heads, key_dim=heads * key)
        else:
            sizes = dict(dim=value * key)
        try:
            block = lived_in(case.block_class(**{**options, **sizes}))
        except ValueError as refusal:
            assert "=" in str(refusal), "a refusal names the argument and its value"
            assume(False)
        case.trials += 1
        torch.manual_seed(0)
        batch, grid, prefix = numbers["batch"], Grid(*numbers["grid"]), numbers["prefix"]
        tokens = prefix + grid.size
        if case.is_mixer:
            of_steps = mixer_sides(block, grid, [(batch, heads, tokens, d) for d in (key, key, value)])
            pairs = [*of_steps, *whole_sides(block, grid, batch, prefix)]
        else:
            pairs = [(block.gate, block.reference, [torch.randn(batch, block.dim, *grid, dtype=torch.float64)])]
        assert pairs, "nothing says what it should give"
        for fast, plain, inputs in pairs:
            if all(p.requires_grad for p in block.parameters()):
                assert_same_function(fast, plain, inputs, list(block.parameters()))
            else:  # its gradient is not the definition's
                assert_equal(fast(*inputs), plain(*inputs))

    holds()


@holds_for("any")
def float32_is_close_to_the_definition(case):
    """In float32 the whole block is within 1e-4 of its definition in float64."""
    block = case.block()
    for grid in GRIDS:
        with case.trying(grid=grid):
            x = case.input(grid)
            exact = case.run(definition(block), x, grid)
            assert error(case.run(copy.deepcopy(block).float(), x.float(), grid), exact) <= 1e-4


@holds_for("any")
def half_precision_is_as_good_as_the_definition_in_it(case):
    """In half precision the error is at most twice that of the definition in the same type."""
    for dtype in (torch.bfloat16, torch.float16):
        with case.trying(dtype=dtype):
            block = case.block().to(dtype)
            exact_block = copy.deepcopy(block).double()
            for (fast, plain, inputs), (_, exact, _) in zip(sides(block, GRID, 5), sides(exact_block, GRID, 5)):
                inputs = [x.to(dtype) for x in inputs]
                out, expected = fast(*inputs), exact(*(x.double() for x in inputs))
                assert out.dtype == dtype
                assert error(out, expected) <= 2 * error(plain(*inputs), expected)


@holds_for("any")
def autocast_is_as_good_as_the_definition_in_half_precision(case):
    """Under autocast the error is at most twice that of the definition in the same type."""
    for dtype in (torch.bfloat16, torch.float16):
        block, x = choosing_once(case.block()), case.input(GRID)
        with case.trying(grid=GRID, dtype=dtype):
            with torch.autocast("cpu", dtype):
                out = case.run(copy.deepcopy(block).float(), x.float(), GRID)
            exact = case.run(definition(block), x, GRID)
            plain = case.run(definition(block).to(dtype), x.to(dtype), GRID)
            assert error(out, exact) <= 2 * error(plain, exact)


@holds_for("any")
def gradient_is_that_of_finite_differences(case):
    """The gradient of the input is that of finite differences."""
    block = case.block()
    with case.trying(grid=SMALL):
        x = case.input(SMALL, prefix=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: case.run(block, x, SMALL), x, fast_mode=True)
