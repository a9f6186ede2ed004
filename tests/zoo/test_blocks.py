"""What every block of the registry must hold to: the properties of `vision_attn.testing`, and what is the zoo's own."""

import pytest
import torch
from conftest import OFTEN, Largest, block_of, cases, in_turn, is_slow, short_name

from vision_attn import Grid, create_block, create_layer, describe, list_blocks
from vision_attn.testing import PROPERTIES
from vision_attn.testing.case import HEADS, VALUE
from vision_attn.testing.exact import fast_path_is_the_definition, routes_give_the_same
from vision_attn.testing.hard_input import gradients_in_float16_are_finite_where_they_fit
from vision_attn.zoo import block_class

# The properties

# Of many runs each: with a block's further options these are left to `make test-all`.
FIRST_OPTIONS = (routes_give_the_same, gradients_in_float16_are_finite_where_they_fit)


def all_that_applies():
    """Every property with every case, those that are slow included.

    Quick is every property with each block's first options, and with its other options every third, in turn, but for
    `FIRST_OPTIONS`; the definition with all of them. Those that take long are tried with one of a few blocks each.
    """
    long = [each for each in reversed(PROPERTIES) if each.slow]
    for number, each in enumerate(PROPERTIES):
        met = set()
        for place, case in enumerate(cases()):
            if each.applies(case):
                block, first = block_of(case), block_of(case) not in met
                met.add(block)
                if each.slow:
                    quick = first and (each, block) in zip(long, OFTEN)
                else:
                    turn = (place + number) % 3 == 0 and each.check not in FIRST_OPTIONS
                    quick = first or turn or each.check is fast_path_is_the_definition
                marks = [] if quick else [pytest.mark.slow]
                yield pytest.param(each, case, id=f"{each.name}-{short_name(case)}", marks=marks)


@pytest.mark.parametrize("each, case", list(all_that_applies()))
def test_property(each, case, record_property):
    before = case.trials
    each.check(case)
    record_property(each.name, case.trials - before)


def test_every_property_is_tried_with_every_block():
    params = list(all_that_applies())
    for each in PROPERTIES:
        every, quick = (
            {block_of(param.values[1]) for param in params if param.values[0] is each and not (few and is_slow(param))}
            for few in (False, True)
        )
        assert quick and (each.slow or quick == every), each.name


# What the zoo promises beyond them


def test_no_matrix_of_all_pairs_is_made_forward_or_backward(mixer_case):
    grid = Grid(41, 43)
    block = mixer_case.block_class(HEADS * VALUE, HEADS, **mixer_case.options)  # keys as wide as values, as it is used
    x = torch.randn(1, 5 + grid.size, block.dim, requires_grad=True)
    with Largest() as largest:
        block(x, grid).sum().backward()
    assert largest.size < HEADS * grid.size**2 / 2


@in_turn({"block": list_blocks(), "dim": [1, 31, 37, 67]})
def test_any_width_has_defaults(block, dim):
    if dim == 1 and block in ("factored", "per_head"):  # three patterns can't share one channel
        with pytest.raises(ValueError, match="num_heads=1: must be ≥ 3"):
            create_layer(block, dim)
        return
    layer = create_layer(block, dim)
    assert layer(torch.randn(2, dim, 5, 3)).shape == (2, dim, 5, 3)


def test_what_cannot_be_causal_says_why(block_name):
    if describe(block_name).causal:
        return
    reason = block_class(block_name).not_causal
    for make in (create_block, create_layer):
        with pytest.raises(ValueError) as refusal:
            make(block_name, 37, causal=True)
        assert f"causal=True: {block_name}" in str(refusal.value) and reason in str(refusal.value)
        make(block_name, 37, causal=False)
